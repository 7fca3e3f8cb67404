"""What people connect and write by mistake, through the training node: it works, or one sentence says why not."""

import asyncio
import contextlib
import errno
import os
import tempfile
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
import concepts_pack
import folder_paths
import pytest
import torch
from concepts_pack.textual_inversion.concept import Concept, Word
from concepts_pack.textual_inversion.file import load, save

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
        lambda value, total, *_, **__: total > 1 and comfy.model_management.interrupt_current_processing(True))


@pytest.fixture
def full_disk(monkeypatch):
    """Lets the kernel refuse every byte of the files that are written, as on a disk with no more room."""
    if not os.path.exists("/dev/full"):
        pytest.skip("This system has no /dev/full")
    opened = Path.open

    def open_full(path, mode="r", *args, **options):
        file = opened(path, mode, *args, **options)
        if "x" in mode:
            full = os.open("/dev/full", os.O_WRONLY)
            os.dup2(full, file.fileno())
            os.close(full)
        return file

    return lambda: monkeypatch.setattr(Path, "open", open_full)


@pytest.fixture
def folder():
    """A folder that everyone may enter and that belongs to whoever runs the tests."""
    with tempfile.TemporaryDirectory() as path:
        os.chmod(path, 0o755)
        yield Path(path)


@contextlib.contextmanager
def an_ordinary_user():
    """Lets permissions bind, also where root runs the tests."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


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


def test_ten_thousand_steps_end_with_cancel(train, cancelled):
    concept, losses, _ = train(steps=10_000)
    assert 1 <= len(losses["loss"]) < 10 and concept.words[0].vectors["clip_l"].isfinite().all()


def test_what_the_host_loads_from_a_checkpoint_without_a_vae(train):
    with pytest.raises(ValueError, match="no VAE; load one and connect it to 'vae'") as error:
        train(vae=comfy.sd.VAE(sd={}))
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


@pytest.mark.skipif(os.name == "nt", reason="There permissions are not those of the folder")
@pytest.mark.parametrize("permissions", [0o555, 0o000], ids=["read only", "closed"])
def test_a_folder_that_cannot_be_written(folder, permissions):
    folder.chmod(permissions)
    with an_ordinary_user(), pytest.raises(ValueError, match="could not be written: Permission denied") as error:
        save(WORD, folder, "mine")
    folder.chmod(0o755)
    assert in_one_sentence(error) and not list(folder.iterdir())


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="Only root can give a file to another user")
def test_a_file_that_may_not_be_replaced(folder):
    """As on Windows while a program has it open."""
    folder.chmod(0o1777)
    before = save(WORD, folder, "mine").read_bytes()
    with an_ordinary_user(), pytest.raises(ValueError, match="it may be in use: choose another name, or ") as error:
        save(WORD, folder, "mine", overwrite=True)
    assert in_one_sentence(error) and [path.read_bytes() for path in folder.iterdir()] == [before]


def scanner(patch, moments):
    """One that holds each new file until it was tried for so often, as virus scanners do on Windows."""
    replace, unlink, tried = os.replace, Path.unlink, []

    def held(source, target):
        tried.append(source)
        if len(tried) <= moments:
            raise PermissionError(errno.EACCES, "Access is denied")
        replace(source, target)

    def kept(path, missing_ok=False):
        if path.suffix == ".part" and len(tried) <= moments:
            raise PermissionError(errno.EACCES, "Access is denied")
        unlink(path, missing_ok)

    patch.setattr(os, "replace", held)
    patch.setattr(Path, "unlink", kept)


def test_a_file_that_a_scanner_holds_for_a_moment_is_written(tmp_path, monkeypatch):
    scanner(monkeypatch, 3)
    path = save(WORD, tmp_path, "mine")
    assert load(path).words[0].placeholder == WORD.words[0].placeholder and list(tmp_path.iterdir()) == [path]


def test_a_file_that_a_scanner_does_not_let_go(tmp_path, monkeypatch):
    scanner(monkeypatch, 99)
    with pytest.raises(ValueError, match="mine.safetensors could not be written: Access is denied.$") as error:
        save(WORD, tmp_path, "mine")
    assert in_one_sentence(error)


@pytest.mark.skipif(os.name == "nt", reason="There permissions are not those of the file")
def test_a_pickle_that_is_held_is_not_called_damaged(folder):
    torch.save({}, folder / "mine.pt")
    (folder / "mine.pt").chmod(0)
    with an_ordinary_user(), pytest.raises(ValueError, match=r"mine.pt cannot be read \(Permission") as error:
        load(folder / "mine.pt")
    assert in_one_sentence(error)


def test_a_file_name_that_no_disk_takes(tmp_path):
    with pytest.raises(ValueError, match="The name has 300 characters; give it fewer") as error:
        save(WORD, tmp_path, "x" * 300)
    assert in_one_sentence(error) and not list(tmp_path.iterdir())


def test_a_full_disk_keeps_the_old_file_and_leaves_no_scraps(tmp_path, full_disk):
    before = save(WORD, tmp_path, "mine").read_bytes()
    full_disk()
    with pytest.raises(ValueError, match="mine.safetensors could not be written: No space left") as error:
        save(WORD, tmp_path, "mine", overwrite=True)
    assert in_one_sentence(error)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


def test_a_full_disk_on_cancel_still_gives_the_word(train, cancelled, full_disk):
    full_disk()
    concept, losses, _ = train(steps=9)
    assert len(losses["loss"]) < 9 and concept.words[0].vectors["clip_l"].isfinite().all()


def test_a_full_disk_does_not_hide_a_lost_loss(train, full_disk):
    full_disk()
    with pytest.raises(ValueError, match="stopped being a number at step 2.* No space left on device") as error:
        train(learning_rate=1e30)
    assert in_one_sentence(error)
