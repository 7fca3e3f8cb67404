"""Global key locking: the key layers read the prompt of the class word, the value layers that of the concept."""

from contextlib import contextmanager
from functools import partial

import comfy.sample
import pytest
import torch
from concepts_pack.host.cross_attention import cross_attentions, overridden, sizes, with_edits
from concepts_pack.host.key_text import KEY, conditioning_of
from concepts_pack.host.text import ready
from concepts_pack.nodes.encode_global_keys import ConceptsEncodeGlobalKeys
from concepts_pack.perfusion.alignment import places_in
from concepts_pack.perfusion.apply import applied, overrides
from concepts_pack.perfusion.concept import Edit
from concepts_pack.perfusion.global_keys import encode_with_global_keys
from concepts_pack.textual_inversion.apply import apply_words
from concepts_pack.textual_inversion.concept import Concept, Word

from nodes import ConditioningConcat, ConditioningSetArea

from .conftest import WIDTH, make_clip, make_model, make_other_clip

LONG = "a painting of a big red house on a hill, " * 9


def generator(seed):
    return torch.Generator().manual_seed(seed)


def taught(clip, class_word="cat", length=1, placeholder="<mine>", widths=None):
    vectors = {name: torch.randn(length, width, generator=generator(4))
               for name, width in (widths or {"clip_l": WIDTH}).items()}
    return apply_words(clip, Concept((Word(placeholder, class_word, vectors),), None, {}), 1.0)


def keys_of(conditioning):
    return conditioning[0][1]["model_conds"][KEY].cond


@contextmanager
def texts_read(model):
    """The encodings that one block's key and value layers receive meanwhile."""
    attention = next(iter(cross_attentions(model.model.diffusion_model).values()))
    read = {"keys": [], "values": []}

    def record(kind, forward, encodings):
        read[kind].append(encodings.clone())
        return forward(encodings)

    with overridden({attention.to_k: partial(record, "keys"), attention.to_v: partial(record, "values")}):
        yield read


def sample(model, positive, negative, cfg=4.0):
    noise = torch.randn(1, 4, 8, 8, generator=generator(3))
    return comfy.sample.sample(model, noise, 1, cfg, "euler", "normal", positive, negative,
                               torch.zeros(1, 4, 8, 8), disable_pbar=True, seed=3)


@pytest.mark.parametrize("text", ["a photo of a {} in the snow", "({}:1.3), at sea", f"{LONG} with a {{}}, red"])
def test_a_class_word_of_equal_length(clip, text):
    """Weights and longer prompts too: what follows the word keeps its place."""
    known = taught(clip)
    result = encode_with_global_keys(known, text.format("<mine>"))
    assert torch.equal(result[0][0], conditioning_of(known, text.format("<mine>"))[0][0])
    torch.testing.assert_close(keys_of(result), conditioning_of(clip, text.format("cat"))[0][0])


@pytest.mark.parametrize(("length", "class_word", "places"), [
    (1, "teddy bear", [5, 6, 7]),
    (2, "cat", [4, 4, 5, 6]),
    (2, "big teddy bear", [5, 6, 7, 8]),
])
def test_a_class_word_of_another_length(clip, length, class_word, places):
    """Tokens 0 to 3 are the start and `a photo of`; then come the word, `at`, `sea`."""
    result = encode_with_global_keys(taught(clip, class_word, length), "a photo of <mine> at sea")
    plain = conditioning_of(clip, f"a photo of {class_word} at sea")[0][0]
    torch.testing.assert_close(keys_of(result)[:, :4 + len(places)], plain[:, [0, 1, 2, 3, *places]])
    assert keys_of(result).shape == result[0][0].shape


def test_a_schedule_without_hooks_for_the_text_encoder(clip):
    """The host makes one encoding for each part of the schedule of such hooks, and without them none."""
    from comfy.hooks import HookGroup
    from comfy_extras.nodes_hooks import SetClipHooks

    (scheduled,) = SetClipHooks().apply_hooks(taught(clip), True, True, HookGroup())
    with pytest.raises(ValueError, match=r"leave nothing to encode; turn schedule_clip off .*\.$"):
        encode_with_global_keys(scheduled, "a <mine>")


@pytest.mark.parametrize("class_word", ["cat", "teddy bear"])
def test_words_around_a_section_border(clip, class_word):
    """A word that the longer class word pushes into the next section is still found there."""
    known = taught(clip, class_word)
    for before in range(70, 78):
        text = "red " * before + "<mine> at sea in the snow"
        result = encode_with_global_keys(known, text)
        assert keys_of(result).shape == result[0][0].shape


@pytest.mark.parametrize("family", ["SD20", "SDXL"])
def test_other_text_encoders(family):
    clip = make_other_clip(family)
    widths = {"SD20": {"clip_h": WIDTH}, "SDXL": {"clip_l": WIDTH, "clip_g": 48}}[family]
    for class_word, places in (("cat", [2, 3]), ("teddy bear", [3, 4])):
        result = encode_with_global_keys(taught(clip, class_word, widths=widths), "a <mine> sleeps")
        plain = conditioning_of(clip, f"a {class_word} sleeps")[0][0]
        torch.testing.assert_close(keys_of(result)[:, :4], plain[:, [0, 1, *places]])


def test_an_encoder_that_learned_nothing_keeps_its_places():
    """SDXL's second encoder reads `teddy bear` for the word already."""
    clip = make_other_clip("SDXL")
    result = encode_with_global_keys(taught(clip, "teddy bear", widths={"clip_l": WIDTH}), "a <mine> sleeps")
    torch.testing.assert_close(keys_of(result)[..., WIDTH:], result[0][0][..., WIDTH:])
    assert not torch.allclose(keys_of(result)[..., :WIDTH], result[0][0][..., :WIDTH])


@pytest.mark.parametrize("filler", range(69, 77))
@pytest.mark.parametrize("length", [1, 4])
def test_encoders_that_need_sections_of_their_own_number(filler, length):
    """The second reads the class word, which is longer or shorter than the learned one at the section's border."""
    clip = make_other_clip("SDXL")
    known = taught(clip, "teddy bear", length, widths={"clip_l": WIDTH})
    result = encode_with_global_keys(known, "on " * filler + "<mine>")
    assert keys_of(result).shape == result[0][0].shape


def test_prompts_without_a_learned_word_are_those_of_clip_text_encode(clip):
    for encoder in (clip, taught(clip)):
        (context, options), = ConceptsEncodeGlobalKeys.execute(encoder, "a cat at sea").result[0]
        (expected, others), = conditioning_of(clip, "a cat at sea")
        assert torch.equal(context, expected) and options.keys() == others.keys()


@pytest.mark.parametrize("negative", ["blurry", LONG])
def test_what_the_layers_read(model, clip, negative):
    positive = encode_with_global_keys(taught(clip), "a photo of <mine>")
    other = conditioning_of(clip, negative)
    with texts_read(model) as read:
        result = sample(model, positive, other)
    pairs = list(zip(read["keys"], read["values"], strict=True))
    assert any(torch.equal(k, keys_of(positive)) and torch.equal(v, positive[0][0]) for k, v in pairs)
    assert any(torch.equal(k, other[0][0]) and torch.equal(v, other[0][0]) for k, v in pairs)
    assert not torch.equal(result, sample(model, conditioning_of(taught(clip), "a photo of <mine>"), other))


def test_cfg_one_and_a_clean_model(model, clip):
    positive, negative = encode_with_global_keys(taught(clip), "a <mine>"), conditioning_of(clip, "")
    plain = sample(model, negative, negative)
    assert torch.isfinite(sample(model, positive, negative, cfg=1.0)).all()
    assert torch.equal(sample(model, negative, negative), plain)


def test_areas(model, clip):
    """The negative prompt of an area has the hooks of the positive one."""
    left = ConditioningSetArea().append(encode_with_global_keys(taught(clip), "a <mine>"), 32, 64, 0, 0, 1.0)[0]
    right = ConditioningSetArea().append(encode_with_global_keys(taught(clip), "two <mine>"), 32, 64, 32, 0, 1.0)[0]
    whole, negative = conditioning_of(clip, "snow"), conditioning_of(clip, "blurry")
    with texts_read(model) as read:
        result = sample(model, [*whole, *left, *right], negative)
    assert torch.isfinite(result).all()
    for region in (left, right):
        assert any(torch.equal(k, keys_of(region)) for k in read["keys"])
        assert not any(torch.equal(v, keys_of(region)) for v in read["values"])


def test_what_is_appended_keeps_its_keys(model, clip):
    locked, more = encode_with_global_keys(taught(clip), "a <mine>"), conditioning_of(clip, "snow")
    joined = ConditioningConcat().concat(locked, more)[0]
    with texts_read(model) as read:
        sample(model, joined, more)
    expected = torch.cat([keys_of(locked), more[0][0]], 1)
    assert any(torch.equal(k, expected) and torch.equal(v, joined[0][0])
               for k, v in zip(read["keys"], read["values"], strict=True))
    with texts_read(model) as read:
        sample(model, [*joined, *locked], more)
    assert {k.shape[1] for k in read["keys"]} == {77, 154}
    assert any(torch.equal(k, keys_of(locked)) for k in read["keys"])


def test_keys_of_an_edited_model_are_not_edited(model, clip):
    """The class word's prompt has no concept in it, so its keys are W_K times it, and only the values are edited."""
    text, known = "a photo of <mine>", taught(ready(clip))
    positive = encode_with_global_keys(known, text)
    target, draw = positive[0][0][0, 4].clone(), generator(2)
    values = {name: torch.randn(out, generator=draw) for name, (_, out) in sizes(model).items()}
    edit = applied(Edit(target, keys_of(positive)[0, 4], values, presence=0.999), torch.eye(WIDTH), "<mine>")
    attentions = cross_attentions(model.model.diffusion_model)
    layers, most = overrides(attentions, [edit])
    with torch.inference_mode(), overridden(layers):
        attention = next(iter(attentions.values()))
        for layer, context in ((attention.to_k, keys_of(positive)), (attention.to_v, positive[0][0])):
            same = torch.equal(layer(context), torch.nn.functional.linear(context, layer.weight))
            assert same == (layer is attention.to_k)
    assert most().item() >= edit.presence
    patched, negative = with_edits(model, [edit], overrides), conditioning_of(clip, "")
    results = [sample(patched, prompt, negative) for prompt in (positive, conditioning_of(known, text))]
    assert not torch.equal(*results) and not torch.equal(results[0], sample(model, positive, negative))


def test_sdxl_samples():
    model, clip = make_model(family="SDXL"), make_other_clip("SDXL")
    known = taught(clip, "teddy bear", widths={"clip_l": WIDTH, "clip_g": 48})
    positive, negative = encode_with_global_keys(known, "a <mine>"), conditioning_of(clip, "")
    assert torch.isfinite(sample(model, positive, negative)).all()


def test_what_cannot_be_locked_is_said(clip):
    with pytest.raises(ValueError, match="<mine> came without a class word"):
        encode_with_global_keys(taught(clip, ""), "a <mine>")
    wide = make_clip()
    wide.cond_stage_model.clip_l.return_projected_pooled = False
    encode = wide.cond_stage_model.encode_token_weights
    wide.cond_stage_model.encode_token_weights = lambda tokens: (encode(tokens)[0].repeat(1, 1, 2), *encode(tokens)[1:])
    with pytest.raises(ValueError, match="cannot be locked for a text encoder like TinyClip"):
        encode_with_global_keys(taught(wide), "a <mine>")


@pytest.mark.parametrize(("prompt", "other", "expected"), [
    ([[0, 1, 2, 3, 0, 0]], [[0, 1, 2, 3, 0, 0]], [0, 1, 2, 3, 4, 5]),
    ([[0, 1, 2, 3, 0, 0]], [[0, 1, 2, 2, 3, 0]], [0, 1, 3, 4, 5, 5]),
    ([[0, 1, 2, 2, 3, 0]], [[0, 1, 2, 3, 0, 0]], [0, 1, 2, 2, 3, 5]),
    ([[0, 1, 2, 0]], [[0, 1, 0, 0], [0, 2, 2, 0]], [0, 1, 6, 3]),
    ([[0, 1, 1, 0], [0, 2, 0, 0]], [[0, 1, 2, 0]], [0, 1, 1, 3, 0, 2, 3, 3]),
])
def test_places(prompt, other, expected):
    assert places_in(prompt, other).tolist() == expected
