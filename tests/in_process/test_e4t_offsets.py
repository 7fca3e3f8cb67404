"""Weight offsets: their maths, and as patches of the host's own beside LoRAs."""

import comfy.lora
import comfy.sample
import pytest
import torch
from concepts_pack.e4t.difference import LowRank, changed_weight
from concepts_pack.e4t.domain import Domain
from concepts_pack.e4t.encoder import Encoder, Shape
from concepts_pack.e4t.offsets import RANK, Offset, new_offsets, offset_weight, penalty
from concepts_pack.host.copies import private_copies, unload
from concepts_pack.host.cross_attention import overridden
from concepts_pack.host.lora_names import lora_names
from concepts_pack.host.objective import denoising_error
from concepts_pack.host.weight_offsets import attention_matrices, matrix_shapes, offset_layers, with_offsets

from .conftest import WIDTH
from .test_nodes import run


def random_offsets(model, size=0.5):
    generator = torch.Generator().manual_seed(3)
    return {layer: Offset(size * torch.randn(out, RANK, generator=generator),
                          torch.randn(RANK, given, generator=generator))
            for layer, (out, given) in matrix_shapes(model).items()}


def weights_with(patcher):
    """The weights as the host computes them for sampling."""
    patcher.patch_model()
    try:
        return {name: weight.clone() for name, weight in patcher.model.state_dict().items()}
    finally:
        patcher.unpatch_model()


def test_fresh_offsets_change_nothing(model):
    offsets = new_offsets(matrix_shapes(model), seed=0)
    for layer, matrix in attention_matrices(model.model.diffusion_model).items():
        assert torch.equal(offset_weight(matrix.weight, offsets[layer]), matrix.weight)
    assert penalty(offsets) == 0
    assert all(bool(offset.right.any()) for offset in offsets.values())  # else no gradient would reach either factor


def test_they_take_the_weights_to_their_device():
    """With --novram weights stay on the processor while a training computes elsewhere."""
    up, down = torch.zeros(4, 1, device="meta"), torch.zeros(1, 3, device="meta")
    for changed in (offset_weight(torch.ones(4, 3), Offset(up, down)),
                    changed_weight(torch.ones(4, 3), None, LowRank(up, down))):
        assert changed.device.type == "meta"


def test_they_act_on_patches_that_the_host_adds_in_each_call(model, clip):
    with private_copies(model, clip) as (unet, _):
        layer = attention_matrices(unet.model.diffusion_model)["middle_block.1.transformer_blocks.0.attn1.to_q"]
        before, x = layer.weight.clone(), torch.randn(2, 5, layer.in_features)
        layer.weight_function = [lambda weight: weight.add_(1)]
        with overridden(offset_layers(unet.model.diffusion_model, lambda name, weight: 2 * weight)):
            torch.testing.assert_close(layer(x), 2 * x @ (before + 1).T)
        assert torch.equal(layer.weight, before)


def test_every_attention_matrix_has_one(model):
    shapes = matrix_shapes(model)
    blocks = {name.rsplit(".", 2)[0] for name in shapes}
    assert len(shapes) == 6 * len(blocks)
    name = "input_blocks.1.1.transformer_blocks.0"
    assert shapes[f"{name}.attn1.to_k"] == (32, 32) and shapes[f"{name}.attn2.to_k"] == (32, WIDTH)
    assert len(matrix_shapes(model, ("to_out.0",))) == 2 * len(blocks)


def test_the_penalty_is_that_of_the_whole_matrices(model):
    offsets = random_offsets(model)
    expected = torch.stack([(o.left @ o.right).square().mean() for o in offsets.values()]).mean()
    torch.testing.assert_close(penalty(offsets), expected)


@pytest.mark.parametrize("strength", [1.0, 0.3, -0.5])
def test_the_host_applies_them(model, strength):
    offsets = random_offsets(model)
    before = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    with torch.inference_mode():
        patched = weights_with(with_offsets(model, offsets, strength))
    for layer, offset in offsets.items():
        name = f"diffusion_model.{layer}.weight"
        torch.testing.assert_close(patched[name], before[name] * (1 + strength * (offset.left @ offset.right)))
    touched = {f"diffusion_model.{layer}.weight" for layer in offsets}
    assert all(torch.equal(patched[name], weight) for name, weight in before.items() if name not in touched)
    assert all(torch.equal(weight, before[name]) for name, weight in model.model.state_dict().items())


def with_lora(model):
    names = lora_names(model)
    key = next(name for name in names if name.endswith("attn2.to_v.weight"))
    out, given = model.model.state_dict()[key].shape
    generator = torch.Generator().manual_seed(1)
    lora = {f"{names[key]}.lora_up.weight": torch.randn(out, 2, generator=generator),
            f"{names[key]}.lora_down.weight": torch.randn(2, given, generator=generator)}
    patched = model.clone()
    patched.add_patches(comfy.lora.load_lora(lora, {names[key]: key}), 0.7)
    return patched, key, 0.7 * lora[f"{names[key]}.lora_up.weight"] @ lora[f"{names[key]}.lora_down.weight"]


def test_loras_count_in_either_order(model):
    offsets = random_offsets(model)
    with torch.inference_mode():
        before, key, difference = with_lora(model)
        after, *_ = with_lora(with_offsets(model, offsets, 1.0))
        first, second = (weights_with(patcher)[key] for patcher in (with_offsets(before, offsets, 1.0), after))
    offset = offsets[key.removeprefix("diffusion_model.").removesuffix(".weight")]
    weight = model.model.state_dict()[key]
    torch.testing.assert_close(first, offset_weight(weight, offset) + difference)
    assert torch.equal(first, second)


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_merged_weights_are_changed_whole(model, ratio):
    """With a LoRA behind the merge, which is added afterwards."""
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    offsets, second = random_offsets(model), model.clone()
    generator = torch.Generator().manual_seed(2)
    second.add_patches({f"diffusion_model.{layer}.weight": (torch.randn(shape, generator=generator),)
                        for layer, shape in matrix_shapes(model).items()})
    with torch.inference_mode():
        (merged,) = ModelMergeSimple().merge(model, second, ratio)
        with_one, key, difference = with_lora(merged)
        before, after = weights_with(merged), weights_with(with_offsets(with_one, offsets, 1.0))
    for layer, offset in offsets.items():
        name = f"diffusion_model.{layer}.weight"
        torch.testing.assert_close(after[name] - (difference if name == key else 0),
                                   offset_weight(before[name], offset), rtol=1e-4, atol=1e-4)


def test_training_computes_what_the_patch_gives(model, clip):
    offsets = random_offsets(model)
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
    context = torch.randn(1, 77, WIDTH, generator=generator)

    def error(unet):
        return denoising_error(unet.model, latents, noise, torch.tensor([100, 800]), context, None)

    with private_copies(with_offsets(model, offsets, 1.0), clip) as (unet, _), torch.no_grad():
        expected = error(unet)
    unload(model.model)
    with private_copies(model, clip) as (unet, _):
        plain = error(unet).detach()
        leaves = {layer: Offset(o.left.requires_grad_(), o.right) for layer, o in offsets.items()}
        layers = offset_layers(unet.model.diffusion_model, lambda name, w: offset_weight(w, leaves[name]))
        with overridden(layers):
            found = error(unet)
        found.mean().backward()
    torch.testing.assert_close(found.detach(), expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found.detach(), plain)
    assert all(bool(offset.left.grad.any()) for offset in leaves.values())


@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_offsets_of_a_domain_act_at_their_strength(model, strength):
    encoder = Encoder(Shape((8, 16), 4, {"clip_l": 4}, {"layer": 4}, side=32))
    known = Domain("cat", "SD15", encoder, random_offsets(model))
    before = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    with torch.inference_mode():
        (patched,) = run("ConceptsApplyDomain", model=model, domain=known, strength=strength).result
        found = weights_with(patched)
    for layer, offset in known.offsets.items():
        name = f"diffusion_model.{layer}.weight"
        torch.testing.assert_close(found[name], before[name] * (1 + strength * (offset.left @ offset.right)))
