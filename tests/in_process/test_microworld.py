"""Laws of the sample world, and that the host reads the sample model as it was trained."""

from pathlib import Path

import comfy.sd
import comfy.supported_models
import comfy.utils
import folder_paths
import numpy as np
import pytest
import torch
from concepts_pack.host.bases import native_side
from concepts_pack.microworld import host, text
from concepts_pack.microworld.captions import PLACES, caption
from concepts_pack.microworld.concepts import CONCEPTS, CURATED, NAMES, concept_photos, super_category
from concepts_pack.microworld.oracle import FACTORS, factors, load, satisfied
from concepts_pack.microworld.prompts import single_object, two_objects
from concepts_pack.microworld.render import render
from concepts_pack.microworld.scene import BIAS, COLOURS, named_look, random_scene
from concepts_pack.microworld.shapes import CLASSES


def scenes(count, seed=0):
    rng = np.random.default_rng(seed)
    return [random_scene(rng, NAMES) for _ in range(count)]


@pytest.mark.parametrize(("kind", "name"), [("checkpoints", host.CHECKPOINT.name), ("e4t", "teddy.safetensors")])
def test_loaders_list_what_they_can_load(kind, name):
    """New loader nodes take the first of the list."""
    host.register()
    ours = [path for path in folder_paths.get_folder_paths(kind) if Path(path).is_relative_to(host.WEIGHTS)]
    assert [found for path in ours for found in folder_paths.recursive_search(path)[0]] == [name]


def test_same_seed_same_world():
    for one, other in zip(scenes(8), scenes(8), strict=True):
        assert one == other
        assert all(np.array_equal(a, b) for a, b in zip(render(one), render(other), strict=True))


def test_masks_cover_what_is_drawn():
    for scene in scenes(40):
        picture, masks = render(scene)
        assert picture.shape == (128, 128, 3) and masks.shape == (2, 128, 128)
        assert masks[0].max() == 255 and (masks[1].max() == 255) == (scene.second is not None)
        assert (masks.astype(int).sum(0) <= 256).all()


def test_captions_say_nothing_false():
    rng = np.random.default_rng(3)
    for scene in scenes(300, seed=2):
        words = caption(rng, scene).replace(",", "").split()
        things = [thing for thing in (scene.first, scene.second) if thing]
        assert {word for word in words if word in COLOURS} <= {thing.look.colour for thing in things}
        assert {word for word in words if word in CLASSES} <= {thing.kind for thing in things}
        said = [place for place, options in PLACES.items() if any(o in " ".join(words) for o in options)]
        assert set(said) <= {scene.background}


def test_mugs_are_mostly_red():
    rng = np.random.default_rng(0)
    red = np.mean([named_look(rng, "mug").colour == "red" for _ in range(2000)])
    assert red == pytest.approx(BIAS + (1 - BIAS) / len(COLOURS), abs=0.03)


def test_concepts_are_nobody_the_model_met():
    looks = {concept.thing.look for concept in CONCEPTS.values()}
    assert len(looks) == len(CONCEPTS) and looks.isdisjoint({thing.look for thing in NAMES.values()})
    assert {concept.split for concept in CONCEPTS.values()} == {"validation", "test"}


def test_concept_photos_are_one_thing_in_many_places():
    pictures, masks = concept_photos("test cat", 3, seed=5)
    assert pictures.dtype == masks.dtype == np.float32 and pictures.shape == (3, 128, 128, 3)
    assert 0 <= pictures.min() and pictures.max() <= 1 and masks.max() == 1
    assert np.array_equal(pictures, concept_photos("test cat", 3, seed=5)[0])
    assert not np.array_equal(pictures[0], pictures[1])
    with pytest.raises(KeyError):
        concept_photos("test unicorn", 1, seed=0)


def test_every_caption_word_has_a_row():
    rng = np.random.default_rng(1)
    rows = text.rows([caption(rng, scene) for scene in scenes(400, seed=9)])
    assert rows.shape == (400, 77) and (rows != text.UNKNOWN).all()


def test_prompt_factors_are_the_oracles():
    rng = np.random.default_rng(0)
    for _ in range(100):
        for prompt, want in (single_object(rng), two_objects(rng)):
            assert all(value in FACTORS[name] for name, value in want.items())
            assert all(word in prompt for name, word in want.items() if name != "background")


def test_oracle_reads_renders():
    drawn = scenes(120, seed=77)
    images = torch.from_numpy(np.stack([render(scene)[0] for scene in drawn])).float() / 255
    assert satisfied(load(), images, [factors(scene) for scene in drawn]).mean() > 0.97


def test_registering_twice_changes_nothing():
    before = list(comfy.supported_models.models)
    host.register()
    assert comfy.supported_models.models == before


@pytest.fixture(scope="module")
def checkpoint():
    from concepts_pack.benchmarks.sampling import load_checkpoint

    return load_checkpoint()


def test_checkpoint_is_small_and_recognised(checkpoint):
    model, clip, vae = checkpoint
    assert host.CHECKPOINT.stat().st_size <= 30e6
    assert isinstance(model.model.model_config, host.Microworld) and native_side(model) == 128
    assert vae.encode(torch.rand(1, 128, 128, 3)).shape == (1, 4, 16, 16)


def test_a_checkpoint_without_text_encoder_loads_without():
    tensors = {name: tensor for name, tensor in comfy.utils.load_torch_file(str(host.CHECKPOINT)).items()
               if not name.startswith("cond_stage_model.")}
    model, clip, *_ = comfy.sd.load_state_dict_guess_config(tensors, output_vae=False)
    assert clip is None and isinstance(model.model.model_config, host.Microworld)


def test_host_encodes_prompts_as_training_did(checkpoint):
    from concepts_pack.microworld.train import Model

    trained = Model()
    state = comfy.utils.load_torch_file(str(host.CHECKPOINT))
    prefix = "cond_stage_model.transformer."
    clip_state = {k.removeprefix(prefix): v.float() for k, v in state.items() if k.startswith(prefix)}
    trained.table.data = clip_state.pop("text_model.embeddings.token_embedding.weight")
    trained.clip.load_state_dict(clip_state)
    prompt = "a striped red cat wearing a hat, on the beach"
    with torch.inference_mode():
        ours = trained.context(text.rows([prompt]).long())
        theirs = checkpoint[1].encode_from_tokens(checkpoint[1].tokenize(prompt))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_curated_set_holds_every_colour_as_often():
    (name,) = CURATED
    pictures, masks = concept_photos(name, 16, seed=3)
    means = np.stack([np.median(p[m > 0.9], 0) for p, m in zip(pictures, masks, strict=True)])
    nearest = np.linalg.norm(means[:, None] - np.array(list(COLOURS.values())), axis=2).argmin(1)
    assert super_category(name) == "mug"
    assert sorted(nearest[:8]) == sorted(nearest[8:]) == list(range(8))
    assert np.array_equal(pictures, concept_photos(name, 16, seed=3)[0])
