"""Edits on a real model: what they change, what they leave alone, and with what they go together."""

import copy
import re
from dataclasses import replace
from functools import partial

import comfy.sample
import pytest
import torch
from concepts_pack.host.cross_attention import cross_attentions, edits_on, overridden, sizes, with_edits
from concepts_pack.host.text import encode, fingerprint_of, ready
from concepts_pack.perfusion.apply import applied, overrides
from concepts_pack.perfusion.concept import Edit
from concepts_pack.perfusion.inspection import gates
from concepts_pack.perfusion.use import apply_concept, concept_hook
from concepts_pack.textual_inversion.apply import apply_words
from concepts_pack.textual_inversion.concept import Concept, Word

from .conftest import DEVICE, WIDTH, make_model

BASE = {"modelspec.base_model": "SD15"}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def precision():
    root = torch.randn(WIDTH, WIDTH, generator=generator(1))
    return root @ root.T / WIDTH + torch.eye(WIDTH)


def edit_of(model, target, seed=2, presence=0.9):
    draw = generator(seed)
    values = {name: torch.randn(out, generator=draw) * 3 for name, (_, out) in sizes(model).items()}
    return Edit(target, torch.randn(len(target), generator=draw), values, presence=presence)


@pytest.fixture(scope="session")
def prompts():
    """Encodings (1 n d) of a prompt whose third token is the concept, and of one without it."""
    return tuple(torch.randn(2, 1, 77, WIDTH, generator=generator(9)))


@pytest.fixture(scope="session")
def edit(model, prompts):
    return edit_of(model, prompts[0][0, 2].clone())


def sample(model, positive, negative, cfg=4.0, seed=3, steps=2):
    noise = torch.randn(1, 4, 8, 8, generator=generator(seed))
    return comfy.sample.sample(model, noise, steps, cfg, "euler", "normal", positive, negative,
                               torch.zeros(1, 4, 8, 8), disable_pbar=True, seed=seed)


def cond(context, **more):
    return [[context, more]]


def near(one, other):
    """Equal but for rounding, which a model of random weights makes large."""
    return (one - other).norm() < 1e-2 * other.norm()


def patched(model, edit, precision, **settings):
    return with_edits(model, [applied(edit, precision, "<mine>", **settings)], overrides)


@pytest.mark.parametrize("everywhere", [True, False])
def test_the_equation_of_the_paper(model, edit, precision, prompts, everywhere):
    """Against equation (3) written with W itself: h = W (e - s i*) + σ((s - β)/τ) o*.

    Unless it acts everywhere, the gate starts from 0 at s = 0.5, and of what it withholds a token keeps the share
    (o - g) (2 - o), where o is the gate of the word, and gets the rest as super-category.
    """
    context = prompts[0]
    one = applied(edit, precision, "<mine>", bias=0.6, temperature=0.15, everywhere=everywhere)
    attentions = cross_attentions(model.model.diffusion_model)
    layers, most = overrides(attentions, [one])
    inverse, i = precision.double(), edit.target_input.double()
    s = context.double() @ inverse @ i / (i @ inverse @ i)
    gate, floor, word = (1 / (1 + torch.exp(-(x - 0.6) / 0.15)) for x in (s, torch.tensor(0.5), torch.ones(())))
    own, given = torch.zeros_like(s), torch.zeros_like(s)
    if not everywhere:
        gate, word = torch.relu(gate - floor) / (1 - floor), (word - floor) / (1 - floor)
        own = torch.relu(s - gate) * torch.relu(word - gate) * (2 - word)
        given = torch.relu(s - gate) - own
        assert (own > 0.01).any() and (given > 0.01).any()
    with torch.inference_mode(False), torch.no_grad(), overridden(layers):
        for name, attention in attentions.items():
            for layer, output in ((attention.to_k, None), (attention.to_v, edit.values[name])):
                weight = layer.weight.double()
                category = weight @ edit.super_input.double()
                expected = (context.double() - (s - own)[..., None] * i) @ weight.T + given[..., None] * category
                expected += gate[..., None] * (category if output is None else output.double())
                torch.testing.assert_close(layer(context).double(), expected, rtol=1e-4, atol=1e-4)
    assert most().item() >= edit.presence


def test_prompts_without_the_concept_keep_every_bit(model, edit, precision, prompts):
    plain = sample(model, cond(prompts[1]), cond(prompts[1] * 0.5))
    assert torch.equal(sample(patched(model, edit, precision), cond(prompts[1]), cond(prompts[1] * 0.5)), plain)
    everywhere = patched(model, edit, precision, everywhere=True, bias=-1.0)
    assert not torch.equal(sample(everywhere, cond(prompts[1]), cond(prompts[1] * 0.5)), plain)


def values_under(model, edits, context):
    attentions = cross_attentions(model.model.diffusion_model)
    with torch.inference_mode(), overridden(overrides(attentions, edits)[0]):
        return [layer(context) for attention in attentions.values() for layer in (attention.to_k, attention.to_v)]


def sibling_of(model, edit, precision, prompts, length=1.0):
    """Another concept of the class: its cosine to the word that the prompt has is 0.8, more than makes it present."""
    metric, i = precision.double(), edit.target_input.double()
    other = prompts[1][0, 4].double()
    other = other - (other @ metric @ i) / (i @ metric @ i) * i
    other = other * ((i @ metric @ i) / (other @ metric @ other)).sqrt()
    return edit_of(model, length * (0.8 * i + 0.6 * other).float(), seed=6, presence=0.7 / length)


@pytest.mark.parametrize("length", [0.7, 1.0, 1.3])
def test_another_concept_of_the_class_acts_only_where_its_own_word_is(model, edit, precision, prompts, length):
    sibling = sibling_of(model, edit, precision, prompts, length)
    one, two = (applied(each, precision, name) for each, name in ((edit, "<mine>"), (sibling, "<two>")))
    torch.testing.assert_close(values_under(model, [one, two], prompts[0]), values_under(model, [one], prompts[0]),
                               rtol=1e-4, atol=1e-4)
    both = prompts[0].clone()
    both[0, 7] = sibling.target_input
    assert not near(values_under(model, [one, two], both)[1][0, 7], values_under(model, [one], both)[1][0, 7])


def test_a_concept_that_rests_keeps_others_of_its_class_off_its_word(model, hook, edit, precision, prompts):
    sibling = applied(sibling_of(model, edit, precision, prompts), precision, "<two>")
    resting = applied(edit, precision, "<mine>", start=0.4, end=0.6)  # between the two steps
    with_sibling, plain = with_edits(model, [sibling], overrides), alone(model, prompts[0])
    assert near(alone(with_edits(with_sibling, [resting], overrides), prompts[0]), plain)
    assert near(alone(with_sibling, prompts[0], keyed(hook(edit), 0.0)), plain)
    assert not near(alone(with_sibling, prompts[0]), plain)
    both = prompts[0].clone()
    both[0, 7] = sibling.edit.target_input
    plain, guarded = (values_under(model, edits, both) for edits in ([], [replace(resting, acting=False), sibling]))
    assert all(near(guarded[0, 2], own[0, 2]) and not near(guarded[0, 7], own[0, 7])
               for guarded, own in zip(guarded[1::2], plain[1::2], strict=True))


def test_two_concepts_of_a_class_share_what_a_token_holds_of_both(model, edit, precision, prompts):
    """A concept beside itself, or beside another step of its training, is not there twice."""
    one = applied(edit, precision, "<mine>", bias=0.6)
    for other in (edit, replace(edit, target_input=edit.target_input * 1.02)):
        both = [one, applied(other, precision, "<again>", bias=0.6)]
        for alone, together in zip(values_under(model, [one], prompts[0]), values_under(model, both, prompts[0]),
                                   strict=True):
            assert (together[0, 2] - alone[0, 2]).norm() < 0.2 * alone[0, 2].norm()


@pytest.mark.parametrize("bias", [0.2, 0.8])
def test_a_concept_that_no_prompt_has_changes_nothing_of_another(model, edit, precision, prompts, bias):
    """Nor on tokens that have read most of it, on which a low gate is wider open than that."""
    context, other = prompts[0].clone(), edit_of(model, prompts[1][0, 4].clone(), seed=8)
    context[0, 3] = torch.lerp(context[0, 3], edit.target_input, 0.8)
    one, two = (applied(each, precision, name, bias=bias) for each, name in ((edit, "<mine>"), (other, "<two>")))
    torch.testing.assert_close(values_under(model, [one, two], context), values_under(model, [one], context),
                               rtol=1e-4, atol=1e-4)


def test_the_base_keeps_every_bit_and_no_patch(model, edit, precision, prompts):
    before = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    plain = sample(model, cond(prompts[0]), cond(prompts[1]))
    edited = sample(patched(model, edit, precision), cond(prompts[0]), cond(prompts[1]))
    assert not torch.equal(edited, plain)
    assert all(torch.equal(weight, before[name]) for name, weight in model.model.state_dict().items())
    assert torch.equal(sample(model, cond(prompts[0]), cond(prompts[1])), plain)
    assert not any("forward" in vars(module) for module in model.model.modules())


def test_an_error_in_the_model_leaves_no_patch(model, edit, precision, prompts):
    broken = patched(model, edit, precision)
    broken.set_model_attn2_patch(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(broken, cond(prompts[0]), cond(prompts[1]))
    assert not any("forward" in vars(module) for module in model.model.modules())


def test_order_of_a_lora_does_not_matter(model, edit, precision, prompts):
    key = next(name for name in model.model.state_dict() if name.endswith("attn2.to_v.weight"))
    change = {key: (torch.randn(model.model.state_dict()[key].shape, generator=generator(5)),)}
    before, after = model.clone(), patched(model, edit, precision)
    before.add_patches(change, 0.5)
    after.add_patches(change, 0.5)
    results = [sample(m, cond(prompts[0]), cond(prompts[1])) for m in (patched(before, edit, precision), after)]
    assert torch.equal(*results)
    assert not torch.equal(results[0], sample(patched(model, edit, precision), cond(prompts[0]), cond(prompts[1])))


def test_batches_and_lengths_do_not_mix(model, edit, precision, prompts):
    """A prompt of one section beside one of two, in one batch by the host's padding and alone, at CFG 1 too."""
    one = patched(model, edit, precision)
    long = torch.cat([prompts[0], prompts[1]], 1)
    together = sample(one, cond(long), cond(prompts[1]))
    again = sample(one, cond(long), cond(prompts[1].repeat(1, 2, 1)))
    assert near(together, again)
    assert torch.isfinite(sample(one, cond(prompts[0]), cond(prompts[1]), cfg=1.0)).all()


@pytest.fixture
def hook(model, clip, precision, monkeypatch):
    """Concept as Hook for an edit, with the metric of these tests; gives the hooks."""
    monkeypatch.setattr("concepts_pack.perfusion.use.precision_for", lambda edit, clip: precision)

    def make(edit, placeholder="<mine>", strength=1.0, **settings):
        word = Word(placeholder, "cat", {"clip_l": torch.randn(1, WIDTH, generator=generator(7))})
        return concept_hook(model, clip, Concept((word,), edit, BASE), strength, **settings)[0]

    return make


def test_a_hook_acts_on_its_prompt_alone(model, hook, edit, precision, prompts):
    hooks = hook(edit, bias=0.6)
    whole = sample(patched(model, edit, precision, bias=0.6), cond(prompts[0]), cond(prompts[1]))
    hooked = sample(model, cond(prompts[0], hooks=hooks), cond(prompts[1]))
    assert near(hooked, whole)
    other = sample(model, cond(prompts[1], hooks=hooks), cond(prompts[0]))
    assert near(other, sample(model, cond(prompts[1]), cond(prompts[0])))


def test_hook_and_model_together_are_one_joint_edit(model, hook, edit, precision, prompts):
    second = edit_of(model, prompts[0][0, 4].clone(), seed=8)
    both = with_edits(model, [applied(edit, precision, "<mine>"), applied(second, precision, "<two>")], overrides)
    expected = sample(both, cond(prompts[0]), cond(prompts[1]))
    hooked = sample(patched(model, edit, precision), cond(prompts[0], hooks=hook(second, "<two>")), cond(prompts[1]))
    assert near(hooked, expected)


def keyed(hooks, *strengths):
    """The hooks with stock keyframes that change the strength at even shares of the sampling."""
    from comfy_extras.nodes_hooks import CreateHookKeyframe, SetHookKeyframes

    keyframes = None
    for number, strength in enumerate(strengths):
        (keyframes,) = CreateHookKeyframe().create_hook_keyframe(strength, number / len(strengths), keyframes)
    return SetHookKeyframes().set_hook_keyframes(hooks, keyframes)[0]


def alone(model, prompt, hooks=None, **settings):
    """Without a negative prompt, which the host computes apart from hooked ones."""
    return sample(model, cond(prompt, **({"hooks": hooks} if hooks else {})), cond(prompt), cfg=1.0, **settings)


def test_keyframes_multiply_the_strength(model, hook, edit, prompts):
    hooks = hook(edit, strength=0.8)
    none, half, one = (alone(model, prompts[0], keyed(hooks, strength)) for strength in (0.0, 0.5, 1.0))
    assert torch.equal(none, alone(model, prompts[0]))
    assert torch.equal(one, alone(model, prompts[0], hooks)) and not torch.equal(one, none)
    assert near(half, alone(model, prompts[0], hook(edit, strength=0.4))) and not near(half, one)


@pytest.mark.parametrize(("strengths", "times"), [((0.0, 1.0), {"start": 0.5}), ((1.0, 0.0), {"end": 0.5})])
def test_keyframes_switch_at_their_step(model, hook, edit, prompts, strengths, times):
    switched = keyed(hook(edit), *strengths)
    expected = alone(model, prompts[0], hook(edit, **times), steps=4)
    for _ in range(2):  # the host keeps hooks and their keyframes from one sampling to the next
        assert torch.equal(alone(model, prompts[0], switched, steps=4), expected)
    assert not torch.equal(expected, alone(model, prompts[0], hook(edit), steps=4))
    assert not torch.equal(expected, alone(model, prompts[0], steps=4))


def test_a_plain_word_gives_no_hook(model, clip, hook, edit, prompts):
    from comfy_extras.nodes_hooks import CombineHooks, ConditioningSetProperties, SetClipHooks

    none, combine = keyed(hook(None), 0.5, 1.0), CombineHooks().combine_hooks
    (positive,) = ConditioningSetProperties().set_properties(cond(prompts[0]), 1.0, "default", None,
                                                             combine(none, hook(None))[0])
    assert torch.equal(sample(model, positive, cond(prompts[1])), sample(model, cond(prompts[0]), cond(prompts[1])))
    one = hook(edit)
    assert torch.equal(alone(model, prompts[0], combine(none, one)[0]), alone(model, prompts[0], one))
    (hooked,) = SetClipHooks().apply_hooks(clip, False, True, none)
    (encoded, _), (expected, _) = (each.encode_from_tokens_scheduled(each.tokenize("a cat"))[0]
                                   for each in (hooked, clip))
    assert torch.equal(encoded, expected)


def test_deep_copies_sample_the_same(model, hook, edit, precision, prompts):
    """Some packs copy the options of a model, or a conditioning, before they change them."""
    one = patched(model, edit, precision)
    other = one.clone()
    other.model_options = copy.deepcopy(one.model_options)
    assert torch.equal(alone(other, prompts[0]), alone(one, prompts[0]))
    assert not torch.equal(alone(one, prompts[0]), alone(model, prompts[0]))
    hooked = cond(prompts[0], hooks=hook(edit))
    results = [sample(model, positive, cond(prompts[1])) for positive in (hooked, copy.deepcopy(hooked))]
    assert torch.equal(*results) and not torch.equal(results[0], sample(model, cond(prompts[0]), cond(prompts[1])))


def test_the_same_concept_twice_acts_once(model, hook, edit, precision, prompts):
    from comfy_extras.nodes_hooks import CombineHooks

    one, other = hook(edit, bias=0.6), hook(replace(edit), "<MINE>", bias=0.9)
    expected = alone(model, prompts[0], one)
    assert torch.equal(alone(model, prompts[0], CombineHooks().combine_hooks(one, other)[0]), expected)
    assert torch.equal(alone(patched(model, edit, precision, bias=0.9), prompts[0], one), expected)
    assert not torch.equal(alone(model, prompts[0], other), expected)


def test_two_concepts_of_one_hook_group_under_masks(model, hook, edit, prompts):
    """Both prompts are computed at once; each meets its own concept alone."""
    from comfy_extras.nodes_hooks import CombineHooks, ConditioningSetProperties

    second = edit_of(model, prompts[1][0, 4].clone(), seed=8)
    left = torch.zeros(1, 64, 64)
    left[..., :32] = 1
    one, two = hook(edit), hook(second, "<two>")

    def scene(*hooks):
        return [entry for prompt, mask, group in zip(prompts, (left, 1 - left), hooks, strict=True)
                for entry in ConditioningSetProperties().set_properties(cond(prompt), 1.0, "default", mask, group)[0]]

    both = CombineHooks().combine_hooks(one, two)[0]
    together, apart, plain = (sample(model, scene(*hooks), cond(prompts[1] * 0.5))
                              for hooks in ((both, both), (one, two), (None, None)))
    assert near(together, apart) and not near(together, plain)


def test_a_word_twice_in_a_prompt(model, edit, precision, prompts):
    """Both tokens get the keys and values that the word gets alone."""
    context = prompts[1].clone()
    context[0, [2, 9]] = edit.target_input
    layers, _ = overrides(cross_attentions(model.model.diffusion_model), [applied(edit, precision, "<mine>")])
    with torch.inference_mode(), overridden(layers):
        for layer in layers:
            torch.testing.assert_close(layer(context)[0, [2, 9]], layer(prompts[0])[0, [2, 2]])


def test_a_concept_with_a_metric_of_its_own(model, edit, precision, prompts):
    own = replace(edit, dual=(edit.target_input @ precision))
    expected = sample(patched(model, edit, precision), cond(prompts[0]), cond(prompts[1]))
    assert near(sample(patched(model, own, torch.eye(WIDTH)), cond(prompts[0]), cond(prompts[1])), expected)
    assert not near(sample(patched(model, edit, torch.eye(WIDTH)), cond(prompts[0]), cond(prompts[1])), expected)


def test_a_metric_of_its_own_spares_measuring_the_encoder(model, clip, edit, monkeypatch):
    monkeypatch.setattr("concepts_pack.perfusion.covariance.precision", pytest.fail)
    word, own = Word("<mine>", "cat", {"clip_l": torch.ones(1, WIDTH)}), replace(edit, dual=edit.target_input)
    own = Concept((word,), own, BASE)
    for use in (apply_concept, concept_hook):
        use(model, clip, own, 1.0)
    assert gates(clip, own, "a <mine>")


def test_order_of_concepts_does_not_matter(model, edit, precision, prompts):
    second = edit_of(model, prompts[0][0, 4].clone(), seed=8)
    pair = [applied(edit, precision, "<mine>"), applied(second, precision, "<two>")]
    forth, back = (sample(with_edits(model, edits, overrides), cond(prompts[0]), cond(prompts[1]))
                   for edits in (pair, pair[::-1]))
    assert near(forth, back)


def test_two_branches_of_one_model(model, edit, precision, prompts):
    left, right = patched(model, edit, precision, bias=0.2), patched(model, edit, precision, bias=0.9)
    first = sample(left, cond(prompts[0]), cond(prompts[1]))
    assert not torch.equal(sample(right, cond(prompts[0]), cond(prompts[1])), first)
    assert torch.equal(sample(left, cond(prompts[0]), cond(prompts[1])), first)


def test_start_and_end(model, edit, precision, prompts):
    plain = sample(model, cond(prompts[0]), cond(prompts[1]))
    never = patched(model, edit, precision, start=0.4, end=0.6)
    assert torch.equal(sample(never, cond(prompts[0]), cond(prompts[1])), plain)
    half, whole = (sample(patched(model, edit, precision, end=end), cond(prompts[0]), cond(prompts[1]))
                   for end in (0.5, 1.0))
    assert not torch.equal(half, plain) and not torch.equal(half, whole)


def test_at_strength_zero_the_values_are_those_of_the_super_category(model, edit, precision, prompts):
    same = Edit(edit.target_input, edit.target_input, edit.values, presence=0.9)
    none = patched(model, same, precision, strength=0.0, bias=-100.0)
    plain = sample(model, cond(prompts[0]), cond(prompts[1]))
    assert not torch.equal(sample(none, cond(prompts[0]), cond(prompts[1])), plain)  # every token is moved a little
    once = patched(model, same, precision, strength=0.0, bias=0.9, temperature=0.001)
    assert torch.isfinite(sample(once, cond(prompts[0]), cond(prompts[1]))).all()


def test_patches_of_other_packs_still_run(model, edit, precision, prompts):
    calls = []

    def other(q, k, v, options):
        calls.append(k.shape)
        return q, k, v

    one = patched(model, edit, precision)
    expected = sample(one, cond(prompts[0]), cond(prompts[1]))
    both = one.clone()
    both.set_model_attn2_patch(other)
    assert torch.equal(sample(both, cond(prompts[0]), cond(prompts[1])), expected) and calls


@pytest.mark.parametrize("order", ["apply, compile", "compile, apply", "apply, compile, apply"])
def test_compiled_models(model, edit, precision, prompts, order, monkeypatch):
    """In whichever order, as the host's wrapper puts a compiled UNet in place of the model's own; and it stays compiled
    in the steps that follow."""
    from comfy.ldm.modules import attention
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    torch._dynamo.reset()
    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)  # the processor's reads files
    second = edit_of(model, prompts[0][0, 4].clone(), seed=8)
    edits = [applied(edit, precision, "<mine>"), applied(second, precision, "<two>")][:order.count("apply")]
    expected = sample(with_edits(model, edits, overrides), cond(prompts[0]), cond(prompts[1]), steps=10)
    compiled = model.clone()
    for step in order.split(", "):
        if step == "apply":
            compiled = with_edits(compiled, [edits.pop(0)], overrides)
        else:
            set_torch_compile_wrapper(compiled, backend="eager")
    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(sample(compiled, cond(prompts[0]), cond(prompts[1]), steps=10), expected,
                               rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_layers_keep_their_names_when_compiled():
    """One block of the UNet, and the UNet around it."""
    from concepts_pack.host.weight_offsets import attention_matrices

    unet = make_model().model.diffusion_model
    matrices, blocks = attention_matrices(unet), unet.middle_block[1].transformer_blocks
    blocks[0] = torch.compile(blocks[0], backend="eager")
    compiled = torch.compile(unet, backend="eager")
    assert attention_matrices(compiled) == matrices
    assert {f"{name}.attn2.to_v": attention.to_v for name, attention in cross_attentions(compiled).items()} == {
        name: layer for name, layer in matrices.items() if name.endswith("attn2.to_v")}


def test_merged_models(model, edit, precision, prompts):
    """A concept on the first model stays on it; its keys are locked through the merged weights."""
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    other, merge = model.clone(), ModelMergeSimple().merge
    draw = generator(6)
    other.add_patches({name: (torch.randn(weight.shape, generator=draw) * 0.3,)
                       for name, weight in model.model.state_dict().items() if "attn2.to_" in name})
    after = patched(merge(model, other, 0.4)[0], edit, precision)
    before = merge(patched(model, edit, precision), other, 0.4)[0]
    results = [sample(m, cond(prompts[0]), cond(prompts[1])) for m in (before, after, patched(model, edit, precision))]
    assert torch.equal(*results[:2]) and not torch.equal(*results[1:])


def small_control_net():
    import comfy.cldm.cldm
    import comfy.controlnet

    from .conftest import HEADS, UNET, fill

    network = comfy.cldm.cldm.ControlNet(**UNET | HEADS, hint_channels=3)
    fill(network, 8)
    return comfy.controlnet.ControlNet(network, load_device=DEVICE)


def test_with_a_control_net(model, edit, precision, prompts):
    """It reads the prompt as it is and is not edited; what it adds and what the concept changes both count."""
    from nodes import ControlNetApplyAdvanced

    control = small_control_net()
    heard, forward = [], control.control_model.forward
    control.control_model.forward = lambda *args, **kwargs: heard.append(kwargs["context"]) or forward(*args, **kwargs)
    picture = torch.rand(1, 64, 64, 3, generator=generator(5))
    pair = cond(prompts[0]), cond(prompts[1])
    steered = ControlNetApplyAdvanced().apply_controlnet(*pair, control, picture, 1.0, 0.0, 1.0)
    one = patched(model, edit, precision)
    plain, edited, controlled, both = (sample(m, *conds, steps=1) for conds in (pair, steered) for m in (model, one))
    assert not any(torch.equal(both, single) for single in (plain, edited, controlled))
    assert heard and all(any(torch.equal(row, prompt[0]) for prompt in prompts) for read in heard for row in read)
    assert torch.equal(sample(model, *steered, steps=1), controlled)


def test_areas(model, edit, precision, prompts):
    """Only the area of the prompt that has the concept changes in a step."""
    from nodes import ConditioningSetArea

    left, right = (ConditioningSetArea().append(cond(prompt), 32, 64, x, 0, 1.0)[0]
                   for prompt, x in zip(prompts, (0, 32), strict=True))
    one = patched(model, edit, precision)
    plain, edited = (sample(m, [*left, *right], cond(prompts[1]), steps=1) for m in (model, one))
    assert torch.equal(plain[..., 4:], edited[..., 4:]) and not torch.equal(plain[..., :4], edited[..., :4])


@pytest.mark.parametrize("weight", [0.8, 1.2, 1.5])
def test_weights_of_words(model, clip, precision, weight):
    """The key of `(<mine>:1.2)` has as much more of the super-category as the encoding has of the concept; below 1 a
    little of the concept is left to the word."""
    from concepts_pack.host.key_text import conditioning_of
    from concepts_pack.textual_inversion.apply import apply_words

    word = Word("<mine>", "cat", {"clip_l": torch.randn(1, WIDTH, generator=generator(7))})
    known = apply_words(clip, Concept((word,), None, BASE), 1.0)
    target, context = (conditioning_of(known, f"a (<mine>:{w}) at sea")[0][0] for w in (1.0, weight))
    edit = edit_of(model, target[0, 2].clone(), presence=0.6)
    one = applied(edit, precision, "<mine>", bias=0.7)
    layers, most = overrides(cross_attentions(model.model.diffusion_model), [one])
    token, i, dual = context[0, 2].double(), edit.target_input.double(), one.dual.double()
    s = token @ dual / (i @ dual)
    assert (s > 1) == (weight > 1)
    to_k = next(iter(cross_attentions(model.model.diffusion_model).values())).to_k
    with torch.inference_mode(), overridden(layers):
        key = to_k(context)[0, 2].double()
    floor, *gates = (1 / (1 + torch.exp((0.7 - x) / 0.1)) for x in (torch.tensor(0.5).double(), s, torch.ones(())))
    gate, full = (torch.relu(g - floor) / (1 - floor) for g in gates)
    own = torch.relu(s - gate) * torch.relu(full - gate) * (2 - full)
    assert (own == 0) == (weight > 1)
    moved = token + (s - own) * (edit.super_input.double() - i)
    torch.testing.assert_close(key, to_k.weight.double() @ moved, rtol=1e-4, atol=1e-4)
    assert most().item() >= edit.presence


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_stored_in_few_bits(dtype, precision, prompts):
    import comfy.model_base
    import comfy.supported_models

    from .conftest import HEADS, UNET, fill, make_text_matter

    config = comfy.supported_models.SD15(dict(UNET))
    config.unet_config |= HEADS
    config.set_inference_dtype(dtype, torch.float32)
    with torch.inference_mode():
        base = comfy.model_base.BaseModel(config, device=torch.device("cpu"))
        fill(base, 1)
        make_text_matter(base)
        base.diffusion_model.to(dtype)
    stored = comfy.model_patcher.ModelPatcher(base, DEVICE, torch.device("cpu"))
    one = patched(stored, edit_of(stored, prompts[0][0, 2].clone()), precision)
    result = sample(one, cond(prompts[0]), cond(prompts[1]))
    assert torch.isfinite(result).all() and not torch.equal(result, sample(stored, cond(prompts[0]), cond(prompts[1])))


@pytest.mark.parametrize("family", ["SD20", "SDXL"])
def test_other_bases(family):
    base = make_model(family=family)
    width = next(iter(sizes(base).values()))[0]
    context = torch.randn(1, 77, width, generator=generator())
    metric = torch.eye(width)
    one = patched(base, edit_of(base, context[0, 2].clone()), metric)
    extra = {"pooled_output": torch.zeros(1, 48)} if family == "SDXL" else {}
    results = [sample(m, cond(context, **extra), cond(context * 0.1, **extra)) for m in (base, one)]
    assert not torch.equal(*results) and torch.isfinite(results[1]).all()


@pytest.mark.parametrize("other_base", ["SDXL"], indirect=True)
@pytest.mark.parametrize("use", [
    apply_concept, concept_hook, lambda _, clip, concept, strength: gates(clip, concept, "a <mine>"),
], ids=["apply", "hook", "inspect"])
def test_a_text_encoder_of_another_base_is_one_sentence(model, clip, edit, other_base, use):
    """The encoder that the two bases share has vectors of one size in both."""
    _, large, both = other_base
    width = next(iter(sizes(large).values()))[0]
    for base, wrong, one in ((model, both, edit), (large, clip, edit_of(large, torch.ones(width)))):
        concept = Concept((Word("<mine>", "cat", {"clip_l": torch.ones(1, WIDTH)}),), one, BASE)
        with pytest.raises(ValueError, match=r"<mine> was learned on SD15 with .*: connect the CLIP of that base\.$"):
            use(base, wrong, concept, 1.0)


@pytest.fixture
def said(caplog):
    """What the pack warned of since the last look."""

    def look():
        messages = [record.getMessage() for record in caplog.records if record.name == "concepts"]
        caplog.clear()
        return messages

    with caplog.at_level("WARNING", "concepts"):
        yield look


def test_another_clip_skip_is_named(model, clip, edit, precision, said, monkeypatch):
    monkeypatch.setattr("concepts_pack.perfusion.use.precision_for", lambda edit, clip: precision)
    word, skipped = Word("<mine>", "cat", {"clip_l": torch.ones(1, WIDTH)}), clip.clone()
    skipped.clip_layer(-2)
    known = Concept((word,), replace(edit, encoder=fingerprint_of(clip)), BASE)
    for use in (apply_concept, concept_hook):
        use(model, clip, known, 1.0)
        assert said() == []
        use(model, skipped, known, 1.0)
        (message,) = said()
        assert "<mine>" in message and "CLIP Set Last Layer" in message


def test_a_model_that_predicts_something_else_is_named(model, clip, edit, precision, said, monkeypatch):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    monkeypatch.setattr("concepts_pack.perfusion.use.precision_for", lambda edit, clip: precision)
    word = Word("<mine>", "cat", {"clip_l": torch.ones(1, WIDTH)})
    known = Concept((word,), edit, {**BASE, "modelspec.prediction_type": "epsilon"})
    apply_concept(model, clip, known, 1.0)
    assert said() == []
    apply_concept(ModelSamplingDiscrete().patch(model, "v_prediction", False)[0], clip, known, 1.0)
    (message,) = said()
    assert "<mine> was learned on a model that predicts epsilon, and this one predicts v;" in message


def test_a_prompt_that_forgot_the_word_is_named(model, edit, precision, prompts, said):
    one = patched(model, edit, precision)
    sample(one, cond(prompts[0]), cond(prompts[1]))
    assert said() == []
    sample(one, cond(prompts[1]), cond(prompts[1] * 0.5))
    (message,) = said()
    assert re.fullmatch(r"No prompt of this picture has enough of <mine> in it \(at most 0\.\d\d, and it takes 0\.90"
                        r"\), so the concept did nothing; write it, or raise its weight\.", message)
    sample(patched(model, edit, precision, everywhere=True), cond(prompts[1]), cond(prompts[1] * 0.5))
    assert said() == []


def test_a_word_too_weak_in_the_prompt_is_said_with_its_amount(model, edit, precision, prompts, said):
    from nodes import ConditioningAverage

    other = prompts[1].clone()
    other[0, 2] = 0
    (half,) = ConditioningAverage().addWeighted(cond(prompts[0]), cond(other), 0.5)
    plain = sample(model, half, cond(prompts[1]))
    assert torch.equal(sample(patched(model, edit, precision), half, cond(prompts[1])), plain)
    (message,) = said()
    assert re.search(r"enough of <mine> in it \(at most 0\.5\d, and it takes 0\.90\)", message)


@pytest.mark.parametrize(("denoise", "start_step", "times"), [
    (1.0, None, {"start": 0.4, "end": 0.6}), (0.3, None, {"end": 0.3}), (1.0, 5, {"end": 0.4}),
])
def test_a_range_outside_the_sampling_is_said(model, edit, precision, prompts, said, denoise, start_step, times):
    one = patched(model, edit, precision, **times)
    noise = torch.randn(1, 4, 8, 8, generator=generator())
    comfy.sample.sample(one, noise, 2 if start_step is None else 10, 4.0, "euler", "normal", cond(prompts[0]),
                        cond(prompts[1]), torch.ones(1, 4, 8, 8), denoise=denoise, start_step=start_step,
                        disable_pbar=True)
    start, end = times.get("start", 0.0), times["end"]
    assert said() == [f"No step of this sampling lies between the start ({start:.2f}) and end ({end:.2f}) of <mine>, "
                      "so only its word acted, without its edit; set them wider."]


def test_a_concept_that_a_hook_took_over_is_not_missed(model, hook, edit, precision, prompts, said):
    sample(patched(model, edit, precision), cond(prompts[0], hooks=hook(edit)), cond(prompts[1]))
    assert said() == []


@pytest.mark.parametrize("placeholder, said", [("<mine>", ";"), ("<MINE>", ";"), ("<other>", " as <mine>;")])
def test_a_concept_read_twice_goes_on_a_model_once(model, clip, hook, edit, placeholder, said):
    vectors = {"clip_l": torch.ones(1, WIDTH)}
    one, again = (Concept((Word(name, "cat", vectors),), found, BASE)
                  for name, found in (("<mine>", edit), (placeholder, replace(edit, target_input=+edit.target_input))))
    patched_model, taught = apply_concept(model, clip, one, 1.0)
    with pytest.raises(ValueError, match=f"^{placeholder} is already on this model{said} apply each concept once"):
        apply_concept(patched_model, taught, again, 1.0)


@pytest.mark.parametrize("times", [{"start": 0.8, "end": 0.2}, {"end": 0.0}, {"start": 1.0}])
def test_a_start_behind_the_end_is_refused(model, clip, hook, edit, times):
    word = Word("<mine>", "cat", {"clip_l": torch.randn(1, WIDTH, generator=generator(7))})
    for use in (lambda: hook(edit, **times),
                lambda: apply_concept(model, clip, Concept((word,), edit, BASE), 1.0, **times)):
        with pytest.raises(ValueError, match=r"<mine> would never act: its start .* is not before its end") as error:
            use()
        assert "\n" not in str(error.value)


def test_overrides_nest_and_unwind(model):
    layer = next(iter(cross_attentions(model.model.diffusion_model).values())).to_v
    x = torch.ones(1, 2, WIDTH)
    with torch.inference_mode():
        plain = layer(x)

        def add(amount, forward, x):
            return forward(x) + amount

        with overridden({layer: partial(add, 1)}), overridden({layer: partial(add, 10)}):
            torch.testing.assert_close(layer(x), plain + 11)
        assert torch.equal(layer(x), plain) and "forward" not in vars(layer)


def test_a_low_bias_gives_a_token_more_of_a_lone_concept_than_it_holds(model, edit, precision, prompts):
    context = prompts[0].clone()
    context[0, 3] = 0.7 * edit.target_input
    gate, floor = torch.sigmoid(torch.tensor([5.0, 3.0]))  # of a similarity of 0.7 and of KIN
    gate = (gate - floor) / (1 - floor)
    assert gate > 0.8
    found = values_under(model, [applied(edit, precision, "<mine>", bias=0.2, temperature=0.1)], context)
    for value, learned in zip(found[1::2], edit.values.values(), strict=True):
        torch.testing.assert_close(value[0, 3], gate * learned, rtol=1e-3, atol=1e-3)


def test_key_strength_scales_the_edit_of_the_keys_alone(model, edit, precision, prompts):
    plain, half, whole = (values_under(model, edits, prompts[0]) for edits in (
        [], [applied(edit, precision, "<mine>", key_strength=0.5)], [applied(edit, precision, "<mine>")]))
    expected = [(before + after) / 2 if place % 2 == 0 else after
                for place, (before, after) in enumerate(zip(plain, whole, strict=True))]
    torch.testing.assert_close(half, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strength", [-1.0, 0.0, 0.5, 2.0])
def test_values_lie_on_the_line_from_the_super_category_through_what_was_learned(
    model, edit, precision, prompts, strength
):
    with torch.inference_mode():
        own = {name: attention.to_v(edit.super_input[None])[0]
               for name, attention in cross_attentions(model.model.diffusion_model).items()}
    moved = replace(edit, values={name: torch.lerp(own[name], value, strength) for name, value in edit.values.items()})
    found, expected = (values_under(model, [one], prompts[0]) for one in (
        applied(edit, precision, "<mine>", strength=strength), applied(moved, precision, "<mine>")))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("setting", "one", "two"), [
    ("bias", 0.3, 1.1), ("temperature", 0.05, 0.3), ("strength", 0.3, 1.5), ("key_strength", 0.3, 1.5),
])
def test_each_concept_has_settings_of_its_own(model, edit, precision, prompts, setting, one, two):
    second = edit_of(model, prompts[0][0, 4].clone(), seed=8)
    pair = [applied(edit, precision, "<mine>", **{setting: one}), applied(second, precision, "<two>", **{setting: two})]
    found = (values_under(model, edits, prompts[0]) for edits in (pair, pair[::-1]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_inspection_shows_the_gate_of_each_token(model, clip):
    word = Word("<mine>", "cat", {"clip_l": torch.randn(1, WIDTH, generator=generator(7))})
    context = encode(ready(apply_words(clip, Concept((word,)), 1.0)), "a <mine> at sea")[0][0].float()
    target = context[2].clone()
    made = replace(edit_of(model, target), dual=target)
    found = gates(clip, Concept((word,), made, BASE), "a <mine> at sea", bias=0.7, temperature=0.2)
    assert [name for name, *_ in found] == ["<|startoftext|>", "a", "learned word", "at", "sea", "<|endoftext|>"]
    s = context[:6] @ target / (target @ target)
    gate, floor = torch.sigmoid((s - 0.7) / 0.2), torch.sigmoid(torch.tensor(-1.0))
    torch.testing.assert_close(torch.tensor([amounts for _, *amounts in found]),
                               torch.stack([s, torch.relu(gate - floor) / (1 - floor)], 1), rtol=1e-3, atol=1e-4)


def test_strength_zero_is_the_model_and_the_clip_themselves(model, clip, edit):
    word = Word("<mine>", "cat", {"clip_l": torch.ones(1, WIDTH)})
    for what in (edit, None):
        assert apply_concept(model, clip, Concept((word,), what, BASE), 0.0) == (model, clip)


def test_strength_leaves_the_word_of_an_edit_as_it_was_learned(model, clip, edit, precision, monkeypatch):
    monkeypatch.setattr("concepts_pack.perfusion.use.precision_for", lambda edit, clip: precision)
    word = Word("<mine>", "cat", {"clip_l": torch.randn(1, WIDTH, generator=generator(7))})
    for use in (apply_concept, concept_hook):
        _, taught = use(model, clip, Concept((word,), edit, BASE), 0.5)
        assert torch.equal(taught.tokenizer.clip_l.learned_words["<mine>"].vectors["clip_l"], word.vectors["clip_l"])


@pytest.mark.parametrize("key_strength", [1.0, 0.5])
def test_trained_keys_take_the_place_of_locked_ones(model, edit, precision, prompts, key_strength):
    """Those of one layer; the others stay locked."""
    layer, attention = next(iter(cross_attentions(model.model.diffusion_model).items()))
    key = torch.randn(len(edit.values[layer]), generator=generator(5))
    (locked, *others), (trained, *same) = (
        values_under(model, [applied(each, precision, "<mine>", bias=0.8, temperature=0.1, key_strength=key_strength)],
                     prompts[0]) for each in (edit, replace(edit, keys={layer: key})))
    gate, floor = torch.sigmoid(torch.tensor([2.0, -3.0]))
    with torch.inference_mode():
        moved = (gate - floor) / (1 - floor) * key_strength * (key - attention.to_k(edit.super_input[None])[0])
    torch.testing.assert_close(trained[0, 2] - locked[0, 2], moved, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(same, others)


def test_concepts_one_after_the_other_are_those_given_at_once(model, edit, precision, prompts):
    one = applied(edit, precision, "<mine>")
    two = applied(edit_of(model, prompts[0][0, 4].clone(), seed=8), precision, "<two>")
    chained = with_edits(with_edits(model, [one], overrides), [two], overrides)
    assert list(edits_on(chained)) == [one, two] and not edits_on(model)
    results = [sample(m, cond(prompts[0]), cond(prompts[1]))
               for m in (chained, with_edits(model, [one, two], overrides), with_edits(model, [two], overrides))]
    assert torch.equal(*results[:2]) and not torch.equal(*results[1:])
