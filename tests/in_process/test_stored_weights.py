"""Checkpoints whose weights are kept in 16 or 8 bits teach a word like any other, and keep every bit."""

import json
from math import isfinite

import comfy.model_base
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import folder_paths
import pytest
import torch
from concepts_pack.host.copies import private_copies
from concepts_pack.host.text import rows
from concepts_pack.microworld.host import CHECKPOINT
from concepts_pack.textual_inversion.train import Keeping, Preview, Recipe, learn_word
from concepts_pack.training.dataset import gather
from safetensors.torch import load_file, save_file

from .conftest import DEVICE

CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn
STORED = (torch.float16, torch.bfloat16, FP8, torch.float8_e5m2)


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))


def stored_as(dtype, model):
    """The toy model as the host keeps it with --fp8_e4m3fn-unet and the like, computing in fp32."""
    sizes = model.model.model_config.unet_config
    config = comfy.supported_models.SD15(sizes)
    config.unet_config = dict(sizes)
    config.set_inference_dtype(dtype, torch.float32)
    kept = comfy.model_base.BaseModel(config, device=CPU)
    kept.load_state_dict(model.model.state_dict())
    return comfy.model_patcher.ModelPatcher(kept, DEVICE, CPU)


def quantised(folder):
    """The sample checkpoint with the UNet's attention in scaled 8 bits, each layer with a scale of its own."""
    weights, layers = load_file(CHECKPOINT), {}
    for name in [n for n in weights if "attn" in n and n.startswith("model.") and n.endswith("to_k.weight")]:
        layer = name.removesuffix(".weight")
        scale = weights[name].float().abs().max() / torch.finfo(FP8).max
        weights |= {name: (weights[name].float() / scale).to(FP8), f"{layer}.weight_scale": scale}
        layers[layer] = {"format": "float8_e4m3fn"}
    path = folder / "quantised.safetensors"
    save_file(weights, path, {"_quantization_metadata": json.dumps({"layers": layers})})
    return path


def bits(module):
    """The bytes of every weight, also of those that are kept in 8 bits with a scale."""
    return {name: tensor.reshape(-1).view(torch.uint8).clone() for name, tensor in module.state_dict().items()}


def learned(model, clip, vae, photos):
    recipe = Recipe("<mine>", "cat", steps=2, learning_rate=0.01, batch_size=2, seed=5)
    return learn_word(model, clip, vae, gather([photos]), recipe, Preview(every=0, steps=1), Keeping(every=1))


@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_a_word_is_learned_and_every_bit_is_kept(model, clip, vae, photos, dtype):
    with torch.inference_mode():
        kept = stored_as(dtype, model)
        before = bits(kept.model)
        lesson = learned(kept, clip, vae, photos)
    (word,) = lesson.concept.words
    moved = word.vectors["clip_l"] - rows(clip, "cat")["clip_l"]
    assert {p.dtype for p in kept.model.diffusion_model.parameters()} == {dtype}
    assert len(lesson.losses) == 2 and all(isfinite(loss) for loss in lesson.losses)
    assert moved.isfinite().all() and moved.any()
    after = bits(kept.model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_eight_bits_teach_nearly_the_same_as_their_numbers_in_full(model, clip, vae, photos):
    """The same rounded weights in fp32 are the measure, so that only the way they are kept differs."""
    with torch.inference_mode():
        eight = stored_as(FP8, model)
        full = stored_as(torch.float32, eight)
    expected, found = (learned(kept, clip, vae, photos) for kept in (full, eight))
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.concept.words[0].vectors, expected.concept.words[0].vectors, rtol=1e-3, atol=1e-4)


def test_a_quantised_checkpoint_teaches_a_word(tmp_path, photos):
    with torch.inference_mode():
        model, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(str(quantised(tmp_path)))
        layer = model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn2.to_k
        assert type(layer.weight.data) is not torch.Tensor
        before = bits(model.model)
        lesson = learned(model, clip, vae, photos)
    assert len(lesson.losses) == 2 and all(isfinite(loss) for loss in lesson.losses)
    assert not torch.equal(lesson.concept.words[0].vectors["clip_l"], rows(clip, "cat")["clip_l"])
    after = bits(model.model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_no_copy_of_a_weight_is_held_for_the_backward_pass(model, clip, dtype):
    with torch.inference_mode():
        kept = stored_as(dtype, model)
    held = []
    with private_copies(kept, clip) as (unet, _):
        layer = unet.model.diffusion_model.middle_block[1].transformer_blocks[0].attn2.to_k
        encoding = torch.randn(1, 2, layer.in_features, device=DEVICE, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.data_ptr()) or x, lambda x: x):
            layer(encoding)
        assert held == [layer.weight.data_ptr()]
    assert {weight.dtype for weight in kept.model.diffusion_model.parameters()} == {dtype}


def test_weights_do_not_grow_where_nothing_is_held(model, clip):
    with torch.inference_mode():
        kept = stored_as(FP8, model)
    with private_copies(kept, clip, recompute=True) as (unet, _):
        assert {weight.dtype for weight in unet.model.diffusion_model.parameters()} == {FP8}
