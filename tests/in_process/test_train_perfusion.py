"""Training a Perfusion concept on toy models: what is learned, what is locked, and that stopping loses nothing."""

from functools import partial

import comfy.model_management
import comfy.utils
import concepts_pack.textual_inversion.train
import folder_paths
import pytest
import torch
from concepts_pack.host.attention_maps import attention_to
from concepts_pack.host.clip_overlay import with_words
from concepts_pack.host.copies import private_copies
from concepts_pack.host.cross_attention import cross_attentions, edits_on, sizes
from concepts_pack.host.text import encode
from concepts_pack.nodes.train_perfusion import ConceptsTrainPerfusion
from concepts_pack.perfusion.covariance import precision
from concepts_pack.perfusion.edit import similarity
from concepts_pack.perfusion.file import from_bytes, to_bytes
from concepts_pack.perfusion.train import EditMethod, EditRecipe
from concepts_pack.textual_inversion.concept import Word
from concepts_pack.textual_inversion.templates import AMONG_OTHERS, fill
from concepts_pack.textual_inversion.train import Keeping, Preview, WordMethod, learn_word
from concepts_pack.training import masks
from concepts_pack.training.dataset import Lessons, gather
from concepts_pack.training.draws import draw
from concepts_pack.training.loop import Plan, train
from concepts_pack.training.masks import otsu, zero_shot

from .conftest import WIDTH
from .test_memory import grown

QUIET = Preview(every=0, steps=1)
METRIC = torch.eye(WIDTH)
METHOD = partial(EditMethod, METRIC, "toy")


def recipe(**changes):
    return EditRecipe(**{"placeholder": "<mine>", "init_text": "cat", "steps": 5, "learning_rate": 0.01,
                         "batch_size": 2, "seed": 5, "value_rate": 0.05, **changes})


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    yield tmp_path
    comfy.utils.set_progress_bar_global_hook(None)
    comfy.model_management.interrupt_current_processing(False)


@pytest.fixture
def method_of(model, clip):
    """Makes a method on private copies that live as long as the test."""
    with private_copies(model, clip) as (unet, text):
        latents = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        yield lambda **changes: METHOD(unet, text, recipe(**changes), Lessons(latents, None, ("", ""))), latents


def learn(model, clip, vae, photos, keeping=None, **changes):
    return learn_word(model, clip, vae, gather([photos]), recipe(**changes), QUIET, keeping, method_of=METHOD)


def test_it_learns(method_of):
    make, latents = method_of
    method = make(sentences=("{}",), own_masks=False)

    def loss():
        with torch.no_grad():
            parts = [method.loss(draw(latents, 1000, 4, 9, step)) for step in range(6)]
        method.met.clear()
        return torch.cat(parts).mean().item()

    before = loss()
    train(method, latents, Plan(steps=30, batch_size=4, seed=0, levels=1000), lambda losses: None)
    assert loss() < before


def test_where_a_layer_looks(model):
    """softmax(q kᵀ / √d), the mean over heads, summed over the tokens asked for."""
    attention = next(iter(cross_attentions(model.model.diffusion_model).values()))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, attention.to_q.in_features, generator=generator)
    context = torch.randn(1, 7, WIDTH, generator=generator)
    with torch.inference_mode():
        q, k = (layer(given).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
                for layer, given in ((attention.to_q, x), (attention.to_k, context)))
        expected = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)
        with attention_to(model.model, [2, 5]) as maps:
            attention(x, context)
        (found,) = maps
    torch.testing.assert_close(found, expected[..., [2, 5]].sum(-1))


def test_constancy_counts_how_far_the_word_is_from_its_target(method_of):
    make, latents = method_of
    batch, found = draw(latents, 1000, 2, 0, 0), []
    for weight in (0.0, 2.0):
        method = make(own_masks=False, constancy=weight)
        method.target_input.data += torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            found.append(method.loss(batch))
        method.installed.close()
    text, target = fill(AMONG_OTHERS[batch.lot % len(AMONG_OTHERS)], "<mine>"), method.target_input
    with torch.no_grad():
        s = encode(method.clip, text)[0][0, method._place(text)] @ target / (target @ target)
    torch.testing.assert_close(found[1] - found[0], (2 * (1 - s) ** 2).expand(2), rtol=1e-3, atol=1e-3)


def test_its_place_is_its_own_where_another_learned_word_stands_before_it(model, clip):
    known = with_words(clip, [Word("<one>", "dog", {"clip_l": torch.ones(1, WIDTH)})])
    with private_copies(model, known) as (unet, text):
        lessons = Lessons(torch.randn(1, 1, 4, 8, 8), None, ("a <one> left of a <mine>",))
        method = METHOD(unet, text, recipe(own_masks=False), lessons)
        method.installed.close()
        assert method._place("a <one> left of a <mine>") == 6
        assert method._place("a <mine> left of a <one>") == 2


def test_a_word_that_hardly_moved_is_met_by_its_own_prompts(method_of):
    """Its class word is as near to i* then, so that nothing lies half way between the two."""
    make, latents = method_of
    method = make(own_masks=False, learning_rate=1e-6)
    train(method, latents, Plan(steps=1, batch_size=2, seed=0, levels=1000), lambda losses: None)
    edit = method.learned_edit()
    for sentence in method.recipe.sentences:
        context, _ = encode(method.clip, sentence.replace("{}", "<mine>"))
        s = similarity(context.float(), edit.target_input[None], edit.target_input[None])
        assert s.max() > edit.presence + 0.1


def test_only_the_word_and_the_values_are_learned(method_of):
    make, latents = method_of
    method = make(own_masks=False)
    values = method.learned_edit().values
    word = method.word().vectors["clip_l"]
    train(method, latents, Plan(steps=2, batch_size=2, seed=0, levels=1000), lambda losses: None)
    edit = method.learned_edit()
    assert edit.keys == {} and edit.values.keys() == values.keys()
    assert not any(torch.equal(edit.values[name], value) for name, value in values.items())
    assert not torch.equal(method.word().vectors["clip_l"], word)
    assert not any(parameter.requires_grad for parameter in method.model.parameters())


def test_values_start_as_those_of_the_super_category(method_of, model, clip):
    make, _ = method_of
    method = make(sentences=("a {}",), own_masks=False)
    with torch.no_grad():
        expected = encode(clip, "a cat")[0][0, 2]
        torch.testing.assert_close(method.super_input, expected)
        for name, attention in cross_attentions(model.model.diffusion_model).items():
            torch.testing.assert_close(method.learned_edit().values[name], attention.to_v.weight @ expected,
                                       rtol=1e-4, atol=1e-5)


def test_values_are_those_of_the_target_input_and_what_was_added(method_of, model):
    make, _ = method_of
    method = make(own_masks=False)
    method.target_input.data += 1
    method.added["input_blocks.1.1.transformer_blocks.0"].data += 2
    edit = method.learned_edit()
    for name, attention in cross_attentions(model.model.diffusion_model).items():
        with torch.no_grad():
            own = attention.to_v.weight @ method.target_input
        more = 2 if name == "input_blocks.1.1.transformer_blocks.0" else 0
        torch.testing.assert_close(edit.values[name], own + more, rtol=1e-4, atol=1e-4)


def test_a_super_category_of_several_tokens_is_read_at_its_last(method_of, clip):
    make, _ = method_of
    method = make(init_text="red brick house", sentences=("a {}",), own_masks=False)
    with torch.no_grad():
        torch.testing.assert_close(method.super_input, encode(clip, "a red brick house")[0][0, 4])


def test_a_corpus_of_ones_own_makes_the_metric_and_comes_along(model, clip, vae, photos, output):
    """The node measures the encoder on it, and whoever applies the concept needs only the concept."""
    widgets = {widget.id: widget for widget in ConceptsTrainPerfusion.GET_SCHEMA().inputs}
    shown = {widget.id: widget.default for widget in widgets["preset"].options[-1].inputs}
    inputs = {name: getattr(widget, "default", None) for name, widget in widgets.items()}
    inputs |= {"model": model, "clip": clip, "vae": vae, "images": photos, "init_text": "cat", "preview_every": 0}
    given = {name: [value] for name, value in inputs.items() if name not in ("masks", "captions")}
    chosen = {"preset": "own settings", **shown, "steps": 1, "batch_size": 1}
    given["preset"] = {name: [value] for name, value in chosen.items()}
    captions = "un chat\n\n le chien dort \n une maison rouge"
    concept = ConceptsTrainPerfusion.execute(**given | {"corpus": [captions]}).result[0]
    dual = from_bytes(to_bytes(concept), "it").edit.dual
    torch.testing.assert_close(dual, concept.edit.target_input @ precision(clip, captions))


def test_without_one_the_concept_has_no_metric_of_its_own(method_of):
    make, _ = method_of
    assert make().learned_edit().dual is None and make(corpus="name").learned_edit().dual is not None


def test_the_target_is_a_moving_average_per_step(method_of):
    make, latents = method_of
    method = make(sentences=("a {}",), own_masks=False, momentum=0.9, learning_rate=1e-9)
    method.target_input.data += torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))  # else it is met already
    start = method.target_input.clone()
    with torch.no_grad():
        met = encode(method.clip, "a <mine>")[0][0, 2]
    train(method, latents, Plan(steps=1, batch_size=2, seed=0, levels=1000, accumulation=2), lambda losses: None)
    torch.testing.assert_close(method.target_input, 0.9 * start + 0.1 * met, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("learned", [True, False])
def test_keys_are_learned_when_asked_for(method_of, learned):
    make, latents = method_of
    method = make(own_masks=False, train_keys=learned)
    train(method, latents, Plan(steps=2, batch_size=2, seed=0, levels=1000), lambda losses: None)
    edit = method.learned_edit()
    assert edit.keys.keys() == (edit.values.keys() if learned else set())


def test_own_masks_are_weights_in_range(method_of):
    make, latents = method_of
    weights = make(own_masks=True, mask_floor=0.2).weights
    assert weights.shape == (2, 1, 1, 8, 8)
    assert torch.allclose(weights.amax((2, 3, 4)), torch.ones(2, 1)) and float(weights.min()) >= 0.2 - 1e-6


@pytest.mark.parametrize("method", [METHOD, WordMethod])
def test_a_photo_without_a_mask_beside_masked_ones_gets_one_of_its_own(model, clip, calm_vae, photos, method):
    mask = torch.zeros(photos.shape[1:3])
    mask[10:30, 10:30] = 1
    given = gather([photos[:2]], [mask[None], torch.ones(1, *mask.shape)])
    settings, found = recipe(own_masks=True, mask_floor=0.2), []

    def method_of(unet, text, recipe, lessons):
        found.append((method(unet, text, recipe, lessons), lessons))
        return found[0][0]

    learn_word(model, clip, calm_vae, given, settings, QUIET, method_of=method_of)
    (made, lessons), = found
    assert lessons.unmasked == (1,) and torch.equal(made.weights[0], lessons.weights[0])
    assert bool((lessons.weights[1] == 1).all()) and made.weights[1].unique().tolist() == pytest.approx([0.2, 1])


def test_cancel_is_heard_while_things_are_looked_for(method_of):
    make, _ = method_of
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        make(own_masks=True)


def test_a_threshold_parts_two_heaps():
    generator = torch.Generator().manual_seed(0)
    few, many = torch.rand(10, generator=generator) + 3, torch.rand(90, generator=generator)
    assert many.max() <= otsu(torch.cat([few, many]).reshape(4, 25)) < few.min()


def test_own_masks_of_many_pictures_are_made_a_few_at_a_time(method_of, monkeypatch):
    """And are what they would be in one go, whatever memory that takes."""
    make, _ = method_of
    method, seen = make(own_masks=False), []
    latents = torch.randn(9, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        named, empty = encode(method.clip, "a photo of a cat"), encode(method.clip, "")

    def found():
        return zero_shot(method.model, latents, named, empty, [5], 3)

    with method.model.diffusion_model.register_forward_pre_hook(lambda _, given: seen.append(len(given[0]))):
        few = found()
    assert max(seen) == 4 and sum(seen) == 2 * 9 * len(masks.NOISE)
    monkeypatch.setattr(masks, "AT_ONCE", 9)
    assert (few == found()).float().mean() > 0.98


def test_same_seed_same_file(model, clip, vae, photos):
    with torch.inference_mode():
        first, again, other = (learn(model, clip, vae, photos, seed=seed) for seed in (5, 5, 6))
    assert to_bytes(first.concept) == to_bytes(again.concept) != to_bytes(other.concept)
    assert sizes(model).keys() == first.concept.edit.values.keys()


def test_base_weights_keep_every_bit(model, clip, vae, photos):
    before = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    learn(model, clip, vae, photos)
    assert all(torch.equal(weight, before[name]) for name, weight in model.model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.model.modules())


def test_recomputing_learns_the_same(model, clip, vae, photos):
    plain, again = (learn_word(model, clip, vae, gather([photos]), recipe(steps=2), QUIET, None, recompute, METHOD)
                    for recompute in (False, True))
    assert plain.losses == pytest.approx(again.losses, rel=1e-4)
    for name, value in plain.concept.edit.values.items():
        torch.testing.assert_close(value, again.concept.edit.values[name], rtol=1e-3, atol=1e-3)


def test_cancelled_and_queued_again_equals_never_stopped(model, clip, vae, photos, output):
    whole = learn(model, clip, vae, photos)
    comfy.utils.set_progress_bar_global_hook(
        lambda value, total, *_, **__: comfy.model_management.interrupt_current_processing(total == 5 and value == 3)
    )
    part = learn(model, clip, vae, photos, Keeping(every=1))
    assert 3 <= len(part.losses) < 5 and list((output / "concepts").glob("mine-step*.safetensors"))
    comfy.utils.set_progress_bar_global_hook(None)
    comfy.model_management.interrupt_current_processing(False)
    rest = learn(model, clip, vae, photos, Keeping(every=1))
    assert rest.losses == whole.losses and to_bytes(rest.concept) == to_bytes(whole.concept)


def test_sdxl_learns_with_both_encoders(other_base, vae, photos):
    _, base, text = other_base
    width = next(iter(sizes(base).values()))[0]
    lesson = learn_word(base, text, vae, gather([photos]), recipe(steps=2), QUIET,
                        method_of=partial(EditMethod, torch.eye(width), "toy"))
    assert len(lesson.concept.edit.target_input) == width and all(map(torch.isfinite, map(torch.tensor, lesson.losses)))


def test_five_trainings_hold_what_two_held(model, clip, vae, photos):
    given = gather([photos])
    assert max(grown(lambda: learn_word(model, clip, vae, given, recipe(steps=1), QUIET, method_of=METHOD), 2, 5)) <= 0


def test_each_step_draws_its_bias_within_the_slide(method_of):
    make, latents = method_of
    method, drawn = make(own_masks=False, bias=0.6, slide=0.2, temperature=0.3), []
    for step in range(20):
        with torch.no_grad():
            method.loss(draw(latents, 1000, 1, 0, step))
        (training,) = method.call.edits
        drawn.append(training.bias)
        assert training.temperature == 0.3
    assert 0.4 <= min(drawn) < 0.5 and 0.7 < max(drawn) <= 0.8


def test_presence_is_half_way_between_the_word_and_the_class_words_prompts(method_of):
    make, _ = method_of
    method = make(own_masks=False, sentences=("a {}", "my {} at sea"))
    method.leaves["clip_l"].data.normal_(std=3.0, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        word, cats = ([encode(method.clip, fill(sentence, text))[0][0] for sentence in method.recipe.sentences]
                      for text in ("<mine>", "cat"))
        spread = torch.cat(cats)
        method.precision = torch.linalg.inv(spread.T @ spread / len(spread) + 0.1 * torch.eye(WIDTH))
        method.target_input.data.copy_(word[0][2])
    dual = method.target_input.detach() @ method.precision
    mine, others = ([each @ dual / (method.target_input.detach() @ dual) for each in found] for found in (word, cats))
    least, most = min(s[2].item() for s in mine), max(s.max().item() for s in others)
    assert most < 0.6 * least
    assert method.learned_edit().presence == pytest.approx((least + most) / 2, rel=1e-3)


def test_value_rates_are_in_sizes_of_the_values_where_asked(method_of):
    make, _ = method_of
    for relative in (False, True):
        method = make(own_masks=False, value_rate=0.1, relative_values=relative)
        sizes = [value.square().mean().sqrt().item() for value in method.learned_edit().values.values()]
        rates = [group["lr"] for group in method.parameters()[1:-1]]
        assert rates == pytest.approx([0.1 * (size if relative else 1) for size in sizes])
        method.installed.close()


def test_trained_keys_move_away_from_the_super_category(method_of):
    make, latents = method_of
    method = make(own_masks=False, train_keys=True)
    before = method.learned_edit().keys
    train(method, latents, Plan(steps=2, batch_size=2, seed=0, levels=1000), lambda losses: None)
    after = method.learned_edit().keys
    assert before and not any(torch.equal(key, before[name]) for name, key in after.items())


def test_samples_are_drawn_with_the_edit(model, clip, vae, photos, monkeypatch):
    heard, sample = [], concepts_pack.textual_inversion.train.sample_picture
    monkeypatch.setattr(concepts_pack.textual_inversion.train, "sample_picture",
                        lambda model, *given: heard.append(edits_on(model)) or sample(model, *given))
    learn(model, clip, vae, photos, steps=1)
    assert heard and all([each.placeholder for each in edits] == ["<mine>"] for edits in heard)


def test_own_masks_of_mirrored_views_are_mirrored(model, clip):
    latents = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with private_copies(model, clip) as (unet, text):
        method = METHOD(unet, text, recipe(mirror=True, own_masks=True), Lessons(latents, None, ("", "")))
    assert torch.equal(method.weights[:, 1], method.weights[:, 0].flip(-1))
    assert not torch.equal(method.weights[:, 1], method.weights[:, 0])


def test_a_thing_is_where_the_model_looks_and_what_its_word_changes(monkeypatch):
    looked, changed = torch.zeros(2, 1, 1, 8, 8)
    looked[..., 2:6, :5] = 1
    changed[..., 2:6, 3:] = 1
    monkeypatch.setattr(masks, "_maps", lambda *given: (looked, changed))
    assert torch.equal(zero_shot(None, torch.zeros(1, 4, 8, 8), None, None, [0], 0), looked * changed)


def test_a_concept_knows_the_text_encoder_it_was_learned_with(method_of):
    make, _ = method_of
    assert make(own_masks=False).learned_edit().encoder == "toy"
