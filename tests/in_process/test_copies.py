"""Private copies compute what the originals compute, let gradients through, and leave no trace."""

import gc
import weakref
from types import SimpleNamespace

import comfy.model_management
import pytest
import torch
from concepts_pack.host.copies import fingerprint, memory_is_short, private_copies
from concepts_pack.host.cross_attention import KEY, edits_on
from concepts_pack.host.objective import denoising_error
from concepts_pack.host.text import encode


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def unchanged(module, before):
    after = module.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_text_encoding_is_bit_identical(model, clip):
    prompts = ["a cat", "a (striped:1.4) cat, on grass", "word " * 100]
    expected = [clip.encode_from_tokens(clip.tokenize(p), return_pooled=True) for p in prompts]
    with private_copies(model, clip) as (_, text):
        for prompt, (context, pooled) in zip(prompts, expected, strict=True):
            ours = encode(text, prompt)
            assert torch.equal(ours[0], context) and torch.equal(ours[1], pooled)


def test_clip_skip_is_kept(model, clip):
    skipped = clip.clone()
    skipped.clip_layer(-2)
    expected = skipped.encode_from_tokens(skipped.tokenize("a cat"))
    with private_copies(model, skipped) as (_, text):
        assert torch.equal(encode(text, "a cat")[0], expected)


def test_a_lora_on_the_inputs_is_in_the_copies(model, clip):
    key = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    tuned = clip.clone()
    tuned.add_patches({key: (torch.ones_like(clip.cond_stage_model.state_dict()[key]),)}, 0.5)
    expected = tuned.encode_from_tokens(tuned.tokenize("a cat"))
    plain = clip.encode_from_tokens(clip.tokenize("a cat"))
    with private_copies(model, tuned) as (_, text):
        assert torch.equal(encode(text, "a cat")[0], expected)
    assert not torch.equal(expected, plain)


def moved_about_by_the_host(patcher):
    """As with dynamic VRAM, where the host keeps weights that cannot be shared."""
    clone = patcher.clone()
    clone.is_dynamic = lambda: True
    return clone


def test_weights_are_held_once_and_can_be_trained_through(model, clip):
    with private_copies(model, clip) as (unet, text):
        for private, original in ((unet.model, model.model), (text.cond_stage_model, clip.cond_stage_model)):
            for ours, theirs in zip(private.parameters(), original.parameters(), strict=True):
                assert ours is not theirs and ours.data_ptr() == theirs.data_ptr()
                assert not ours.requires_grad and not ours.is_inference()


def test_weights_the_host_moves_about_are_loaded_again(model, clip):
    with private_copies(moved_about_by_the_host(model), clip) as (unet, _):
        for ours, theirs in zip(unet.model.parameters(), model.model.parameters(), strict=True):
            assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr()


def test_originals_keep_every_bit_also_in_use_with_a_lora(model, clip):
    before = weights(model.model), weights(clip.cond_stage_model)
    key = "diffusion_model.input_blocks.0.0.weight"
    lora = model.clone()
    lora.add_patches({key: (torch.ones_like(before[0][key]),)}, 0.5)
    comfy.model_management.load_models_gpu([lora], force_full_load=True)
    assert not unchanged(model.model, before[0])
    with private_copies(lora, clip) as (unet, _):
        assert torch.equal(unet.model.state_dict()[key], before[0][key] + 0.5)
        assert unchanged(model.model, before[0])
    assert unchanged(model.model, before[0]) and unchanged(clip.cond_stage_model, before[1])


def test_copies_are_freed_and_state_is_restored(model, clip):
    with pytest.raises(KeyError), private_copies(model, clip) as (unet, text):
        alive = [weakref.ref(unet.model), weakref.ref(text.cond_stage_model)]
        assert comfy.model_management.in_training
        raise KeyError
    del unet, text
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    assert not comfy.model_management.in_training


def test_a_loader_that_cannot_load_again_is_named(model, clip):
    once = moved_about_by_the_host(model)
    once.cached_patcher_init = None
    with pytest.raises(ValueError, match="The MODEL comes from a loader that cannot load it a second time"):
        with private_copies(once, clip):
            pass


def one_step(model, clip, recompute):
    """Loss, its gradient in the context, and how many numbers were kept for the backward pass."""
    generator, kept = torch.Generator().manual_seed(0), []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
    context = torch.randn(1, 77, 32, generator=generator, requires_grad=True)
    with private_copies(model, clip, recompute) as (unet, _):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = denoising_error(unet.model, latents, noise, torch.tensor([100, 700]), context, None).mean()
        loss.backward()
    return loss.item(), context.grad, sum(kept)


def test_recomputing_gives_the_same_loss_and_gradients(model, clip):
    plain, gradient, all_kept = one_step(model, clip, recompute=False)
    again, same, few_kept = one_step(model, clip, recompute=True)
    assert plain == again and torch.equal(gradient, same) and gradient.any()
    assert few_kept < all_kept / 2


@pytest.mark.parametrize("pictures, gigabytes", [(1, 8.6), (4, 21.5), (8, 38.7)])
def test_memory_is_short_by_the_size_of_the_batch(model, monkeypatch, pictures, gigabytes):
    """Asked of a card with a UNet as large as that of Stable Diffusion 1.5."""
    weights, large = sum(weight.numel() for weight in model.model.parameters()), 859_520_964
    card = model.clone()
    card.load_device = torch.device("cuda")
    for more, short in ((0.9, True), (1.1, False)):
        monkeypatch.setattr(comfy.model_management, "get_total_memory",
                            lambda device, more=more: more * gigabytes * 1e9 * weights / large)
        assert memory_is_short(card, pictures) == short and not memory_is_short(model, pictures)


def test_a_fingerprint_tells_loras_and_checkpoints_apart(model, velocity_model, clip):
    lora = model.clone()
    key = "diffusion_model.input_blocks.0.0.weight"
    lora.add_patches({key: (torch.ones(lora.model.get_parameter(key).shape),)}, 0.5)
    found = []
    for patcher in (model, model, lora):
        with private_copies(patcher, clip) as (unet, text):
            found.append(fingerprint(unet, text.patcher))
    assert found[0] == found[1] != found[2]


def test_what_does_not_act_while_training_is_said(model, clip, caplog):
    edited, bypassed = model.clone(), model.clone()
    edited.model_options["transformer_options"][KEY] = [SimpleNamespace(placeholder="<one>")]
    bypassed.set_injections("bypass_lora", [])
    for unheard, sentence in ((edited, "<one> on this MODEL does not act while training"),
                              (bypassed, "put on this MODEL by bypass does not act while training")):
        caplog.clear()
        with private_copies(unheard, clip) as (unet, _):
            assert not edits_on(unet)
        assert caplog.text.count(sentence) == 1
    assert edits_on(edited)
