"""The downward half of the UNet, words in batches, and the encoder that hears and says them."""

import pytest
import torch
from concepts_pack.e4t.encoder import Encoder, Shape
from concepts_pack.host import unet_features as features_module
from concepts_pack.host.clip_overlay import with_words
from concepts_pack.host.copies import private_copies
from concepts_pack.host.text import encode, encode_words, rows, widths
from concepts_pack.host.unet_features import unet_features
from concepts_pack.textual_inversion.concept import Word

from .conftest import WIDTH, make_model


def batch(size=2):
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, size, 4, 8, 8, generator=generator)
    return latents, noise, torch.linspace(50, 900, size).long()


def test_features_are_the_means_of_what_the_blocks_give(model, clip):
    """Against a pass of the whole UNet that is watched from outside."""
    empty = encode(clip, "")
    unet, seen = model.model.diffusion_model, []
    found = unet_features(model.model, *batch(), *empty)
    hooks = [layer.register_forward_hook(lambda m, i, output: seen.append(output))
             for layer in (*(block[-1] for block in unet.input_blocks), unet.middle_block[-1])]
    with torch.no_grad():
        features_module.denoising_error(model.model, *batch(), *empty)
    for hook in hooks:
        hook.remove()
    expected = torch.cat([output.mean((2, 3)) for output in seen], 1)
    torch.testing.assert_close(found, expected)
    assert found.shape == (2, 32 + 32 + 32 + 64 + 64)  # first, block, down, block, middle


def test_the_upward_half_does_not_run_and_nothing_stays_behind(model, clip):
    unet, ran = model.model.diffusion_model, []
    hook = unet.output_blocks[0][0].register_forward_hook(lambda *_: ran.append(1))
    unet_features(model.model, *batch(), *encode(clip, ""))
    hook.remove()
    assert not ran
    assert not any(block[-1]._forward_hooks for block in (*unet.input_blocks, unet.middle_block))


def test_a_unet_without_a_middle_block(clip):
    """As KOALA has it, which the host knows as SDXL."""
    model = make_model(changes={"transformer_depth_middle": -2})
    unet = model.model.diffusion_model
    assert unet.middle_block is None
    assert unet_features(model.model, *batch(), *encode(clip, "")).shape == (2, 32 + 32 + 32 + 64)


def test_features_hear_picture_and_timestep(model, clip):
    latents, noise, _ = batch()
    empty = encode(clip, "")

    def of(latents, level):
        return unet_features(model.model, latents, noise, torch.tensor([level, level]), *empty)

    assert not torch.allclose(of(latents, 50), of(latents, 800), rtol=1e-3)
    assert not torch.allclose(of(latents, 50), of(-latents, 50), rtol=1e-3)


def check_words(clip, learned=False):
    generator = torch.Generator().manual_seed(5)
    vectors = {name: torch.randn(3, 1, size, generator=generator) * 0.1 for name, size in widths(clip).items()}
    texts = ["a <mine>", "a photo of a <mine> at night", "<mine>"]
    start = {name: found[:1] for name, found in rows(clip, "cat").items()}
    taught = with_words(clip, [Word("<mine>", "cat", start)])
    leaves = {name: value.clone().requires_grad_(learned) for name, value in vectors.items()}
    with torch.set_grad_enabled(learned):
        context, pooled = encode_words(taught, texts, leaves)
    for row, text in enumerate(texts):
        own = with_words(clip, [Word("<mine>", "cat", {name: value[row] for name, value in vectors.items()})])
        with torch.no_grad():
            expected, expected_pooled = encode(own, text)
        torch.testing.assert_close(context[row].detach(), expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pooled[row].detach(), expected_pooled[0], rtol=1e-4, atol=1e-5)
    return context, leaves


def test_each_sample_has_a_word_of_its_own(clip):
    check_words(clip)


def test_each_sample_has_a_word_of_its_own_with_other_bases(other_base):
    check_words(other_base[2])


def test_gradients_reach_each_samples_own_vectors(model, clip):
    with private_copies(model, clip) as (_, text):
        context, leaves = check_words(text, learned=True)
        context[1].square().sum().backward()
    (gradient,) = (leaf.grad for leaf in leaves.values())
    assert [bool(g.any()) for g in gradient] == [False, True, False]


SHAPE = Shape((8, 16), 12, {"clip_l": WIDTH}, {"a": 4, "b": 6}, side=32, width=16, code=8)


def heard(encoder, size=2):
    generator = torch.Generator().manual_seed(1)
    pictures = torch.rand(size, 48, 48, 3, generator=generator)
    if not encoder.shape.stem:
        pictures = torch.randn(size, len(encoder.shape.levels), 8, generator=generator)
    return encoder(encoder.image_part(pictures), torch.randn(size, 12, generator=generator))


def test_a_new_encoder_says_the_class_word():
    said = heard(Encoder(SHAPE))
    assert not said.words["clip_l"].any() and not any(value.any() for value in said.values.values())
    assert said.words["clip_l"].shape == (2, WIDTH)
    assert {name: tuple(value.shape) for name, value in said.values.items()} == {"a": (2, 4), "b": (2, 6)}


@pytest.mark.parametrize("stem", [True, False])
def test_every_part_of_the_encoder_learns(stem):
    torch.manual_seed(0)
    encoder = Encoder(Shape((8, 16) if stem else (8, 8), 12, {"clip_l": WIDTH}, {"a": 4}, stem, 32, 16, 8))
    for layer in (*encoder.words.values(), encoder.values):
        torch.nn.init.normal_(layer.weight)
    said = heard(encoder)
    (said.words["clip_l"].square().sum() + said.values["a"].square().sum()).backward()
    still = [name for name, parameter in encoder.named_parameters() if parameter.grad is None
             or not parameter.grad.any()]
    # a shift of all places' attention alike changes nothing
    assert still == [name for name in still if name.startswith("stem.looks") and name.endswith("bias")]
    assert not torch.allclose(said.words["clip_l"][0], said.words["clip_l"][1])


def test_an_encoder_says_what_it_said_when_it_was_saved():
    """A file of an earlier version of the pack means the same."""
    encoder = Encoder(Shape((8, 16), 12, {"clip_l": 4}, {"a": 3}, side=32, width=16, code=8))
    generator = torch.Generator().manual_seed(0)
    for parameter in encoder.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    pictures = torch.linspace(0, 1, 32 * 32 * 3).view(1, 32, 32, 3)
    with torch.no_grad():
        said = encoder(encoder.image_part(pictures), torch.linspace(-1, 1, 12)[None])
    torch.testing.assert_close(torch.cat([said.words["clip_l"][0], said.values["a"][0]]), torch.tensor(
        [0.6713, 0.5145, -0.7802, -1.0548, 0.9521, 0.9778, -0.5922]), rtol=1e-3, atol=1e-3)
