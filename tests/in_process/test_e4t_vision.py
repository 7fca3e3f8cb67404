"""Domains that see through CLIP vision: pretrained, saved, and tuned with, on the nodes."""

from dataclasses import replace

import comfy.model_management
import folder_paths
import pytest
import torch
from concepts_pack.e4t import domain as domain_file
from concepts_pack.e4t import method
from concepts_pack.e4t.pretrain import Keeping, parser, pretrain
from concepts_pack.e4t.pretrain import run as command
from concepts_pack.e4t.samples import Samples, draw_pair, read_samples
from concepts_pack.host.clip_vision import Vision
from concepts_pack.host.progress import Cancelled
from concepts_pack.microworld.host import WEIGHTS
from PIL import Image
from safetensors.torch import save

from . import ranks
from .conftest import VISION, WIDTH, make_clip_vision
from .test_nodes import NODES, run

LEVELS = VISION["num_hidden_layers"] // 2
PLAIN = ranks.samples()
SETTINGS = {"folder": "cats", "class_word": "cat", "name": "", "steps": 2, "batch_size": 2, "seed": 0, "rate": 1e-3,
            "regulariser": 1e-3, "resolution": 64, "mirror": False}
TOKENS = torch.randn(6, 2, LEVELS, VISION["hidden_size"], generator=torch.Generator().manual_seed(8)).half()


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """An input folder with pictures of three things, and one for domains."""
    for name in ("output", "input"):
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "e4t", ([str(tmp_path / "e4t")], {".safetensors"}))
    folder_paths.filename_list_cache.pop("e4t", None)
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "input" / "cats").mkdir(parents=True)
    for number in range(3):
        pixels = torch.randint(256, (64, 64, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / "input" / "cats" / f"{number}.png")
    return tmp_path


def learn(model, clip, folder, vision, start=None, watch=lambda step, loss: None, **changes):
    samples = Samples(TOKENS, PLAIN.latents, PLAIN.weights, vision=vision)
    return pretrain(model, clip, samples, replace(ranks.RECIPE, **changes), Keeping(folder), torch.eye(WIDTH),
                    watch=watch, start=start)


@pytest.fixture
def domain(model, clip, clip_vision, tmp_path):
    """One that sees through `clip_vision` and whose words depend much on what it sees."""
    made = learn(model, clip, tmp_path / "states", Vision(clip_vision).fingerprint)
    torch.manual_seed(0)
    for layer in made.encoder.words.values():
        torch.nn.init.normal_(layer.weight, std=0.5)
    return made


def tuned(model, clip, vae, photos, domain, steps=0, **changes):
    given = {"model": model, "clip": clip, "vae": vae, "images": photos[:1], "masks": None, "domain": domain}
    for widget in NODES["ConceptsTuneE4T"].GET_SCHEMA().inputs:
        given.setdefault(widget.id, getattr(widget, "default", None))
    given |= {"steps": steps, "preview_every": 0, "preview_steps": 1, **changes}
    return run("ConceptsTuneE4T", **{name: [value] for name, value in given.items()}).result[0]


def test_features_are_computed_once_and_kept_instead_of_pictures(tmp_path, clip_vision):
    vision, looks = Vision(clip_vision), []
    hook = clip_vision.model.register_forward_hook(lambda *_: looks.append(1))

    def read(with_vision):
        return read_samples(tmp_path / "input" / "cats", 2, 64, 32, False, 0.1, 0,
                            lambda p: p.permute(0, 3, 1, 2)[:, :1, ::8, ::8].repeat(1, 4, 1, 1), "vae",
                            tmp_path / "work", with_vision)

    first, again, plain = (ranks.in_memory(read(seen_by)) for seen_by in (vision, vision, None))
    hook.remove()
    assert len(looks) == 3  # one for each thing, none for what was kept
    assert first.pictures.shape == (3, 2, LEVELS, VISION["hidden_size"]) and first.pictures.dtype == torch.float16
    assert torch.equal(first.pictures, again.pictures) and first.vision == again.vision == vision.fingerprint
    assert plain.pictures.shape == (3, 2, 32, 32, 3) and plain.vision == ""
    pictures = torch.stack([torch.tensor(list(Image.open(path).getdata())).view(64, 64, 3) / 255.0
                            for path in sorted((tmp_path / "input" / "cats").iterdir())])
    torch.testing.assert_close(first.pictures[:, 0].float(), vision.layers(pictures), rtol=1e-3, atol=1e-3)


def test_pairs_carry_what_clip_vision_made_of_another_view():
    samples = Samples(TOKENS, PLAIN.latents, PLAIN.weights, vision="some")
    pair = draw_pair(samples, 1000, 4, 0, 3)
    for row, subject in enumerate(pair.batch.photos):
        assert torch.equal(pair.pictures[row], TOKENS[subject, 1 - pair.batch.views[row]].float())
    assert samples.part(1, 3).vision == "some"


def test_pretraining_learns_to_hear_it(model, clip, tmp_path):
    start, later = (learn(model, clip, tmp_path / f"{steps}", "32 layers, abc", steps=steps) for steps in (1, 5))
    assert later.encoder.shape.levels == (VISION["hidden_size"],) * LEVELS and later.encoder.stem is None
    assert later.vision == "32 layers, abc" and len(later.encoder.levels) == LEVELS
    assert not torch.equal(start.encoder.levels[0].weight, later.encoder.levels[0].weight)


def test_it_goes_on_only_with_the_same_one(model, clip, tmp_path):
    first, steps = learn(model, clip, tmp_path, "one"), []
    for vision in ("one", "two"):
        learn(model, clip, tmp_path, vision, watch=lambda step, loss: steps.append(step), steps=7)
    assert steps == [6, 7, 1, 2, 3, 4, 5, 6, 7]  # from the state of the first, and anew
    assert learn(model, clip, tmp_path, "one", first, steps=1).vision == "one"
    with pytest.raises(ValueError, match=r"hears another CLIP vision \(one\) than this one \(two\)"):
        learn(model, clip, tmp_path, "two", first, steps=1)


def test_pretrained_saved_loaded_and_tuned_on_the_nodes(model, clip, calm_vae, clip_vision, photos):
    vae = calm_vae
    given = {"model": model, "clip": clip, "vae": vae, **SETTINGS}
    learned, _ = run("ConceptsPretrainE4T", **given, clip_vision=clip_vision).result
    loaded, word = run("ConceptsLoadDomain", name="cat.safetensors").result
    assert word == "cat" and loaded.vision == learned.vision == Vision(clip_vision).fingerprint
    assert domain_file.to_bytes(loaded) == domain_file.to_bytes(learned)
    assert all(map(torch.equal, loaded.encoder.state_dict().values(), learned.encoder.state_dict().values()))
    for result in ("concept", "tuned model"):
        concept = tuned(model, clip, vae, photos, loaded, 1, clip_vision=clip_vision, result=result)
        assert concept.words[0].vectors["clip_l"].isfinite().all()
    own, _ = run("ConceptsPretrainE4T", **given | {"name": "own"}).result
    assert own.vision == "" and own.encoder.stem is not None


@pytest.mark.parametrize("changes", [{"name": "a:b"}, {"class_word": "toy: bear"}])
def test_a_name_that_no_file_can_have_is_told_before_the_pictures_are_read(model, clip, vae, tmp_path, changes):
    with pytest.raises(ValueError, match="cannot name a file: give 'name' letters"):
        run("ConceptsPretrainE4T", model=model, clip=clip, vae=vae, **SETTINGS | changes)
    assert not (tmp_path / "output").exists()


def test_files_are_called_after_the_class_word_and_hide_none_of_the_pack(model, clip, calm_vae, tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "e4t",
                        ([str(tmp_path / "e4t"), str(WEIGHTS / "domains")], {".safetensors"}))
    for word, file in (("toy  bear", "toy-bear"), ("teddy", "teddy_2"), ("teddy", "teddy_2")):
        output = run("ConceptsPretrainE4T", model=model, clip=clip, vae=calm_vae, **SETTINGS | {"class_word": word})
        assert output.ui.as_dict()["text"] == (f"Saved: choose {file}.safetensors in Load E4T Domain.",)
        assert domain_file.to_bytes(domain_file.load(tmp_path / "e4t" / f"{file}.safetensors")) == domain_file.to_bytes(
            output.result[0])
    assert [run("ConceptsLoadDomain", name=f"{name}.safetensors").result[0].base for name in ("teddy", "teddy_2")] == [
        "Microworld", "SD15"]
    assert sorted(path.name for path in (tmp_path / "e4t").iterdir()) == ["teddy_2.safetensors", "toy-bear.safetensors"]


def test_pretraining_is_what_the_graph_is_queued_for_and_notices_other_pictures(tmp_path):
    node = NODES["ConceptsPretrainE4T"]
    assert node.GET_SCHEMA().is_output_node
    before = node.fingerprint_inputs(**SETTINGS)
    assert node.fingerprint_inputs(**SETTINGS) == before
    (tmp_path / "input" / "cats" / "1.png").unlink()
    assert node.fingerprint_inputs(**SETTINGS) != before


def test_cancel_stops_the_reading(model, clip, vae, tmp_path):
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(Cancelled):
        run("ConceptsPretrainE4T", model=model, clip=clip, vae=vae, **SETTINGS)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("result", ["concept", "tuned model"])
def test_the_word_is_of_what_clip_vision_sees(model, clip, vae, clip_vision, photos, domain, result, monkeypatch):
    def word(vision):
        return tuned(model, clip, vae, photos, domain, clip_vision=vision, result=result).words[0].vectors["clip_l"]

    same = word(clip_vision)
    assert torch.equal(same, word(clip_vision))
    blind = make_clip_vision()  # of the same first numbers, so the same fingerprint
    blind.model.vision_model.embeddings.patch_embedding.weight.data[1:] = 0
    assert not torch.equal(same, word(blind))


@pytest.mark.parametrize("result", ["concept", "tuned model"])
def test_the_unet_is_back_when_it_is_heard_though_clip_vision_took_its_room(
        model, clip, vae, clip_vision, photos, domain, result, monkeypatch):
    seen, hear, loaded = Vision.layers, method.unet_features, []

    def pushes_out(self, pictures):
        comfy.model_management.unload_all_models()
        return seen(self, pictures)

    def heard(unet, *args):
        loaded.append(any(each.model.model is unet for each in comfy.model_management.current_loaded_models))
        return hear(unet, *args)

    monkeypatch.setattr(Vision, "layers", pushes_out)
    monkeypatch.setattr(method, "unet_features", heard)
    tuned(model, clip, vae, photos, domain, clip_vision=clip_vision, result=result)
    assert loaded and all(loaded)


@pytest.mark.parametrize(("other", "said"), [
    (None, r"'cat' sees pictures through CLIP vision \(4 layers of 32 numbers, .*\); load the one"),
    ({"seed": 6}, r"another CLIP vision \(4 layers of 32 numbers, .*\) than the one at 'clip_vision' \(4 layers of 32"),
    ({"hidden_size": 48}, r"than the one at 'clip_vision' \(4 layers of 48 numbers"),
    ({"model_type": "siglip_vision_model"}, "no CLS token"),
])
def test_a_missing_or_wrong_one_is_one_sentence(model, clip, vae, photos, domain, other, said):
    given = other and make_clip_vision(**other)
    with pytest.raises(ValueError, match=said) as caught:
        tuned(model, clip, vae, photos, domain, clip_vision=given)
    assert "\n" not in str(caught.value)


def test_one_that_is_not_needed_is_not_looked_at(model, clip, vae, photos, tmp_path):
    plain = pretrain(model, clip, PLAIN, ranks.RECIPE, Keeping(tmp_path / "states"), torch.eye(WIDTH))
    words = [tuned(model, clip, vae, photos, plain, **given).words[0].vectors["clip_l"]
             for given in ({}, {"clip_vision": make_clip_vision(model_type="siglip_vision_model")})]
    assert torch.equal(*words)


def test_the_command_names_a_file_that_is_gone(model, clip, vae, tmp_path):
    given = ["--folder", str(tmp_path / "input" / "cats"), "--checkpoint", "toy", "--word", "cat", "--steps", "1",
             "--clip-vision", str(tmp_path / "gone.safetensors")]
    with pytest.raises(ValueError, match="There is no CLIP vision .*gone.safetensors"):
        command(parser().parse_args(given), (model, clip, vae))


@pytest.mark.parametrize("stem", [True, False])
def test_a_file_that_names_no_eye_or_two_is_damaged(model, clip, tmp_path, domain, stem):
    plain = pretrain(model, clip, PLAIN, ranks.RECIPE, Keeping(tmp_path / "states"), torch.eye(WIDTH))
    header, held = domain_file.parsed(domain_file.to_bytes(plain if stem else domain), "it")
    header |= {"e4t.vision": "some" if stem else ""}
    with pytest.raises(ValueError, match="either a stem of its own or a CLIP vision"):
        domain_file.from_bytes(domain_file.with_metadata(save(held), header), "bad.safetensors")
