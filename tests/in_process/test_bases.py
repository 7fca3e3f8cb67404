"""Every family of checkpoint: what can be trained on is, the rest is named."""

import copy

import comfy.latent_formats
import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import folder_paths
import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from concepts_pack.host.bases import base_name, manner, native_side, predicts
from concepts_pack.host.copies import encoded_by, private_copies
from concepts_pack.host.objective import denoising_error
from concepts_pack.host.pictures import to_latents, vae_encode
from concepts_pack.host.text import encode
from concepts_pack.textual_inversion import train as word_training
from concepts_pack.textual_inversion.apply import apply_words
from concepts_pack.textual_inversion.file import load, save
from concepts_pack.textual_inversion.train import Preview, Recipe, WordMethod, learn_word
from concepts_pack.training.dataset import Lessons, gather
from concepts_pack.training.loop import Plan, train

from .conftest import DEVICE

ENCODERS = {"SD20": {"clip_h"}, "SDXL": {"clip_l", "clip_g"}}
RECIPE = Recipe("<mine>", "cat", steps=3, learning_rate=0.01, batch_size=2, seed=5)


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))


def test_a_word_is_learned_saved_and_used(other_base, vae, photos, tmp_path):
    name, model, clip = other_base
    with torch.inference_mode():
        lesson = learn_word(model, clip, vae, gather([photos]), RECIPE, Preview(every=0, steps=1))
    (word,) = lesson.concept.words
    assert word.vectors.keys() == ENCODERS[name] and len(lesson.losses) == 3
    assert lesson.concept.metadata["modelspec.base_model"] == name
    loaded = load(save(lesson.concept, tmp_path, "mine"))
    assert loaded.words[0].vectors.keys() == ENCODERS[name]
    taught = apply_words(clip, loaded, 1.0)
    known, unknown = (c.encode_from_tokens(c.tokenize("a <mine> on grass")) for c in (taught, clip))
    assert not torch.equal(known, unknown)


def test_every_encoder_learns(other_base):
    name, model, clip = other_base
    latents = torch.randn(1, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with private_copies(model, clip) as (unet, text):
        method = WordMethod(unet, text, RECIPE, Lessons(latents, None, ("",)))
        before = method.word()
        train(method, latents, Plan(steps=2, batch_size=2, seed=0, levels=1000), lambda losses: None)
        after = method.word()
    for encoder in ENCODERS[name]:
        moved = (after.vectors[encoder] - before.vectors[encoder]).norm()
        assert moved > 0


def test_base_and_encoders_keep_every_bit(other_base, vae, photos):
    _, model, clip = other_base
    parts = model.model, clip.cond_stage_model
    before = [copy.deepcopy(part.state_dict()) for part in parts]
    learn_word(model, clip, vae, gather([photos]), RECIPE, Preview(every=0, steps=1))
    for part, saved in zip(parts, before, strict=True):
        assert all(torch.equal(saved[key], value) for key, value in part.state_dict().items())


@pytest.mark.parametrize("other_base", ["SDXL"], indirect=True)
def test_sdxl_hears_of_the_pooled_text_and_of_the_picture_size(other_base):
    _, model, clip = other_base
    unet = model.model
    with torch.inference_mode():
        context, pooled = encode(clip, "a cat")
        latents, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        plain, otherwise = (denoising_error(unet, latents, noise, torch.tensor([300]), context, pooled + shift)
                            for shift in (0, 1))
    assert not torch.allclose(plain, otherwise)
    sizes = [unet.extra_conds(cross_attn=context, pooled_output=pooled, noise=noise, device=noise.device, width=w,
                              height=64)["y"].cond for w in (64, 128)]
    assert not torch.equal(*sizes)


@pytest.mark.parametrize(("family", "kind", "side"), [
    ("SD15", "EPS", 512), ("SD15", "V_PREDICTION", 512), ("SD20", "EPS", 512), ("SD20", "V_PREDICTION", 768),
    ("SDXL", "EPS", 1024), ("SDXL", "V_PREDICTION", 1024), ("SSD1B", "EPS", 1024),
])  # fmt: skip
def test_the_side_that_a_checkpoint_was_made_for(family, kind, side, caplog):
    """The host warns of a config that is asked for what it does not have."""
    model = patcher(family, in_channels=4)
    predicted = comfy.model_base.ModelType[kind]
    model.model.model_sampling = comfy.model_base.model_sampling(model.model.model_config, predicted)
    caplog.clear()
    assert native_side(model) == side and not caplog.records


def test_the_side_follows_what_a_node_says_the_unet_predicts():
    model, noise = patcher("SD20", in_channels=4), comfy.model_base.ModelType.EPS
    model.model.model_sampling = comfy.model_base.model_sampling(model.model.model_config, noise)
    assert (native_side(model), predicts(model)) == (512, "epsilon")
    mended = ModelSamplingDiscrete().patch(model, "v_prediction", False)[0]
    assert (native_side(mended), predicts(mended)) == (768, "v") and native_side(model) == 512
    assert predicts(ModelSamplingDiscrete().patch(model, "x0", False)[0]) == ""
    assert manner(ModelSamplingDiscrete().patch(model, "eps", False)[0]) == manner(model) != manner(mended)


def test_latents_are_scaled_as_the_model_is_told_to(model, vae, photos):
    """As ModelSamplingContinuousEDM tells it for Playground."""
    told = model.clone()
    other = comfy.latent_formats.SDXL_Playground_2_5()
    told.add_object_patch("latent_format", other)
    with torch.inference_mode():
        raw = vae_encode(vae, photos[:1])
        assert torch.equal(to_latents(model, vae, photos[:1]), model.model.process_latent_in(raw))
        assert torch.equal(to_latents(told, vae, photos[:1]), other.process_in(raw))
    assert manner(told) != manner(model) and encoded_by(told, vae) != encoded_by(model, vae)


def test_a_vae_that_does_not_belong_to_the_model_is_named(model, vae, photos, monkeypatch):
    monkeypatch.setattr(vae, "latent_channels", 16)
    with pytest.raises(ValueError, match="This VAE makes latents of 16 channels and the MODEL takes 4; connect"):
        to_latents(model, vae, photos[:1])


def test_a_vae_that_gives_no_numbers_is_named_and_nothing_is_kept(model, clip, vae, photos, tmp_path, monkeypatch):
    """As some of SDXL's do in half precision."""
    monkeypatch.setattr(vae, "encode", lambda pictures, own=vae.encode: own(pictures) * float("nan"))
    with pytest.raises(ValueError, match="latents of a picture that are not numbers; start ComfyUI without --fp16-vae"):
        learn_word(model, clip, vae, gather([photos]), RECIPE, Preview())
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("other_base", ["SDXL"], indirect=True)
def test_large_photos_are_cut_to_that_side(other_base, vae, monkeypatch):
    """Which is all that is run here: a step at that size takes minutes on a processor."""
    _, model, clip = other_base

    def cut(photos, side, *_):
        raise InterruptedError(side)

    monkeypatch.setattr(word_training, "squares", cut)
    with pytest.raises(InterruptedError, match="1024"):
        learn_word(model, clip, vae, gather([torch.rand(1, 1040, 1100, 3)]), RECIPE, Preview())


def patcher(family, **unet):
    config = getattr(comfy.supported_models, family)(unet)
    model = torch.nn.Module()
    model.model_config, model.latent_format = config, config.latent_format
    return comfy.model_patcher.ModelPatcher(model, DEVICE, torch.device("cpu"))


@pytest.mark.parametrize("family", ["SD15", "SD20", "SDXL", "SSD1B"])
def test_supported_families(family):
    assert base_name(patcher(family, in_channels=4)) == family


@pytest.mark.parametrize("family", ["SDXLRefiner", "SD3", "Flux", "SD21UnclipL", "LotusD"])
def test_other_families_are_named(family):
    with pytest.raises(ValueError, match=rf"Stable Diffusion 1.x, 2.x and SDXL checkpoints; this one is {family}\."):
        base_name(patcher(family, in_channels=4))


@pytest.mark.parametrize("family", ["SD15", "SDXL"])
def test_inpainting_checkpoints_are_named(family):
    with pytest.raises(ValueError, match="this one is for inpainting or editing"):
        base_name(patcher(family, in_channels=9))
