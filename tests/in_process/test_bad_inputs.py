"""What people connect and write by mistake, through the training node: it works, or one sentence says why not."""

import asyncio
import contextlib
import os
import resource
import tempfile
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
import concepts_pack
import folder_paths
import pytest
import torch
from concepts_pack.microworld.host import CHECKPOINT
from concepts_pack.textual_inversion.concept import Concept, Word
from concepts_pack.textual_inversion.file import load, save
from safetensors.torch import load_file, save_file

extension = asyncio.run(concepts_pack.comfy_entrypoint())
NODES = {node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())}
TRAIN = NODES["ConceptsTrainTextualInversion"]
WORD = Concept((Word("<mine>", "cat", {"clip_l": torch.ones(1, 32)}),))


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    yield tmp_path / "output" / "concepts"
    comfy.utils.set_progress_bar_global_hook(None)
    comfy.model_management.interrupt_current_processing(False)


@pytest.fixture
def train(model, clip, vae, photos):
    """Runs the training node with its own defaults and two steps; what differs is given by name."""
    shown = {widget.id: getattr(widget, "default", None) for widget in TRAIN.GET_SCHEMA().inputs}
    preset = next(widget for widget in TRAIN.GET_SCHEMA().inputs if widget.id == "preset")
    pace = {widget.id: widget.default for widget in preset.options[-1].inputs} | {"steps": 2, "batch_size": 1}
    usual = shown | {"model": model, "clip": clip, "vae": vae, "images": photos, "init_text": "cat",
                     "preview_every": 0, "preview_steps": 1}

    def run(images=None, **changes):
        own = {name: [changes.pop(name, value)] for name, value in {"preset": "own settings", **pace}.items()}
        inputs = {name: [value] for name, value in (usual | changes).items()}
        if images is not None:
            inputs["images"] = images
        return TRAIN.execute(**inputs | {"preset": own}).result

    return run


@pytest.fixture
def cancelled():
    """Presses Cancel after the first step."""
    comfy.utils.set_progress_bar_global_hook(
        lambda value, total, *_, **__: total == 9 and comfy.model_management.interrupt_current_processing(True))


@contextlib.contextmanager
def full_disk():
    """No file can grow beyond 100 bytes, as on a disk with no more room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def in_one_sentence(error):
    return "\n" not in str(error.value) and str(error.value).endswith(".")


def test_photos_of_all_kinds_and_sizes_at_once(train):
    concept, losses, _ = train([torch.rand(2, 70, 96, 3), torch.rand(1, 80, 64, 4), torch.rand(1, 64, 200, 1)])
    assert len(losses["loss"]) == 2 and concept.words[0].vectors["clip_l"].isfinite().all()


@pytest.mark.parametrize("rate", [-0.01, -0.0])
def test_a_learning_rate_that_is_not_above_zero(train, rate):
    with pytest.raises(ValueError, match="learning rate must be a number above 0") as error:
        train(learning_rate=rate)
    assert in_one_sentence(error)


@pytest.mark.parametrize("placeholder", ["a/b", "..", "a\\b", "embedding:a", "<a><b>", "my\tcat", "x" * 300])
def test_a_placeholder_that_no_prompt_or_file_could_hold(train, placeholder):
    with pytest.raises(ValueError, match="placeholder") as error:
        train(placeholder=placeholder)
    assert in_one_sentence(error)


def test_a_placeholder_of_great_length_survives_cancel(train, cancelled, output):
    placeholder = f"<{'x' * 60}>"
    concept, losses, _ = train(placeholder=placeholder, steps=9)
    assert len(losses["loss"]) < 9 and concept.words[0].placeholder == placeholder
    assert [load(path).words[0].placeholder for path in output.glob("*.safetensors")] == [placeholder]


@pytest.mark.parametrize("vectors", [1, 16])
def test_an_init_text_of_a_hundred_words(train, vectors):
    concept, *_ = train(init_text="a striped cat on grass " * 20, vectors=vectors)
    learned = concept.words[0].vectors["clip_l"]
    assert learned.shape == (vectors, 32) and learned.isfinite().all()


def test_ten_thousand_steps_end_with_cancel(train, output):
    comfy.utils.set_progress_bar_global_hook(
        lambda value, total, *_, **__: value == 3 and total == 10_000
        and comfy.model_management.interrupt_current_processing(True))
    concept, losses, _ = train(steps=10_000)
    assert 3 <= len(losses["loss"]) < 10 and concept.words[0].vectors["clip_l"].isfinite().all()


def without(part, folder):
    """The sample checkpoint in a file that lacks a part of it, as the host loads it."""
    weights = {name: weight for name, weight in load_file(CHECKPOINT).items() if not name.startswith(part)}
    save_file(weights, folder / "part.safetensors")
    return comfy.sd.load_checkpoint_guess_config(str(folder / "part.safetensors"))[:3]


@pytest.mark.parametrize(("part", "complaint"), [
    ("first_stage_model.", "no VAE; load one and connect it to 'vae'"),
    ("cond_stage_model.", r"no text encoder \(CLIP\); load one and connect it to 'clip'"),
])
def test_a_checkpoint_file_without_a_part(train, tmp_path, part, complaint):
    model, clip, vae = without(part, tmp_path)
    with pytest.raises(ValueError, match=complaint) as error:
        train(model=model, clip=clip, vae=vae)
    assert in_one_sentence(error)


@pytest.mark.parametrize("other_base", ["SDXL"], indirect=True)
def test_a_text_encoder_of_another_family(train, other_base):
    with pytest.raises(ValueError, match="CLIP") as error:
        train(clip=other_base[2])
    assert in_one_sentence(error)


@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".bin"])
def test_an_empty_file(tmp_path, ending):
    (tmp_path / f"empty{ending}").write_bytes(b"")
    with pytest.raises(ValueError, match=f"empty{ending} ") as error:
        load(tmp_path / f"empty{ending}")
    assert in_one_sentence(error)


def test_a_full_disk_keeps_the_old_file_and_leaves_no_scraps(tmp_path):
    before = save(WORD, tmp_path, "mine").read_bytes()
    with full_disk(), pytest.raises(ValueError, match="mine.safetensors could not be written: ") as error:
        save(WORD, tmp_path, "mine", overwrite=True)
    assert in_one_sentence(error)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


def test_a_full_disk_on_cancel_still_gives_the_word(train, cancelled):
    with full_disk():
        concept, losses, _ = train(steps=9)
    assert len(losses["loss"]) < 9 and concept.words[0].vectors["clip_l"].isfinite().all()


def test_a_full_disk_does_not_hide_a_lost_loss(train):
    with full_disk(), pytest.raises(ValueError, match="stopped being a number at step 2"):
        train(learning_rate=1e30)
