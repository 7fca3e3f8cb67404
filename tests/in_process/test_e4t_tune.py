"""Concepts tuned on toys: where they start, what they learn, and that they are used as they were learned."""

import copy
from dataclasses import replace
from functools import partial

import comfy.model_management
import comfy.utils
import concepts_pack.textual_inversion.train
import folder_paths
import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from concepts_pack.e4t import difference_file, tune_whole
from concepts_pack.e4t.difference import scaled
from concepts_pack.e4t.domain import Domain
from concepts_pack.e4t.encoder import Encoder
from concepts_pack.e4t.learner import shape_of
from concepts_pack.e4t.method import Predictor
from concepts_pack.e4t.offsets import RANK, Offset
from concepts_pack.e4t.samples import later
from concepts_pack.e4t.tune import SHARE, TunedEdit, mean_of, predict_each, tuning_recipe
from concepts_pack.e4t.tune_whole import WORD_PATH, TunedWhole, whole_recipe
from concepts_pack.e4t.use import apply_offsets, apply_tuned
from concepts_pack.host.copies import private_copies
from concepts_pack.host.cross_attention import cross_attentions
from concepts_pack.host.objective import denoising_error
from concepts_pack.host.text import encode, rows
from concepts_pack.host.weight_offsets import ALL_PARTS, matrix_shapes
from concepts_pack.perfusion.file import to_bytes
from concepts_pack.perfusion.train import EditMethod, EditRecipe
from concepts_pack.textual_inversion.train import Keeping, Preview, learn_word
from concepts_pack.textual_inversion.word import row_size
from concepts_pack.training.dataset import Lessons, gather
from concepts_pack.training.draws import draw
from safetensors.torch import load as load_tensors

from . import ranks
from .conftest import WIDTH, Told, told
from .test_memory import grown
from .test_nodes import run
from .test_stored_weights import FP8, stored_as
from .test_widgets import inputs_of

METRIC = torch.eye(WIDTH)
QUIET = Preview(every=0, steps=1)


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    yield tmp_path
    comfy.utils.set_progress_bar_global_hook(None)
    comfy.model_management.interrupt_current_processing(False)


@pytest.fixture(scope="module")
def domain(model, clip):
    """One whose predictions are far from the class word."""
    with private_copies(model, clip) as (unet, text):
        torch.manual_seed(0)
        encoder = Encoder(shape_of(unet, text, ranks.RECIPE))
    for layer in (*encoder.words.values(), encoder.values):
        torch.nn.init.normal_(layer.weight, std=0.5)
    generator = torch.Generator().manual_seed(1)
    offsets = {layer: Offset(0.1 * torch.randn(out, RANK, generator=generator),
                             torch.randn(RANK, given, generator=generator))
               for layer, (out, given) in matrix_shapes(model).items()}
    return Domain("cat", "SD15", encoder.requires_grad_(False).eval(), offsets)


@pytest.fixture
def photos():
    return gather([torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(4))])


def edited(domain, photos, model, clip, vae, steps, keeping=None, **changes):
    method = partial(TunedEdit, domain, photos, METRIC, "toy")
    recipe = tuning_recipe(domain, clip, "<mine>", steps, 5, own_masks=False, **changes)
    return learn_word(model, clip, vae, photos, recipe, QUIET, keeping, method_of=method).concept


def whole(domain, photos, model, clip, vae, steps, keeping=None, **changes):
    method = partial(TunedWhole, domain, photos)
    return learn_word(model, clip, vae, photos, whole_recipe(domain, "<mine>", steps, 5, **changes), QUIET, keeping,
                      method_of=method).concept


def test_predictions_are_means_over_sixteen_noise_levels_and_all_pictures(domain, model, clip):
    generator = torch.Generator().manual_seed(5)
    latents, pictures = torch.randn(2, 4, 8, 8), torch.rand(2, 64, 64, 3)
    with private_copies(model, clip) as (unet, text), torch.no_grad():
        predictor = Predictor(unet, text, "cat", domain.encoder, {}, SHARE, METRIC)
        found = mean_of(predict_each(predictor, pictures, latents, 5))
        words, added = [], []
        for picture, latent in zip(pictures, latents, strict=True):
            for level, noise in enumerate(torch.randn(16, 4, 8, 8, generator=generator)):
                time = torch.tensor([int((level + 0.5) * 1000 / 16)])
                said = predictor.predict(picture[None], latent[None], noise[None], time)
                words.append(predictor.words(said)["clip_l"][0])
                added.append(predictor.added(said))
        predictor.installed.close()
    assert torch.stack(words).std(0).mean() > 1e-3 * torch.stack(words).std()
    torch.testing.assert_close(found.words["clip_l"], torch.stack(words).mean(0), rtol=1e-4, atol=1e-5)
    for name, value in found.added.items():
        torch.testing.assert_close(value, torch.cat([each[name] for each in added]).mean(0), rtol=1e-3, atol=1e-4)


def test_an_edit_starts_where_the_encoder_puts_it(domain, model, clip):
    """In the mean of all pictures."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 1, 4, 8, 8, generator=generator)
    photos = gather([torch.rand(2, 64, 64, 3, generator=generator)])
    with private_copies(model, clip) as (unet, text):
        predictor = Predictor(unet, text, "cat", domain.encoder, {}, SHARE, METRIC)
        expected = mean_of(predict_each(predictor, torch.stack([p.picture for p in photos]), latents[:, 0], 5))
        predictor.installed.close()
        recipe = tuning_recipe(domain, text, "<mine>", 5, 5, own_masks=False)
        method = TunedEdit(domain, photos, METRIC, "toy", unet, text, recipe, Lessons(latents, None, ("", "")))
        concept = method.concept({})
        with torch.no_grad():
            met = encode(method.clip, "a photo of a <mine>")[0][0, 5]
    torch.testing.assert_close(concept.words[0].vectors["clip_l"], expected.words["clip_l"])
    for name, attention in cross_attentions(model.model.diffusion_model).items():
        with torch.no_grad():
            own = attention.to_v.weight @ concept.edit.target_input
        torch.testing.assert_close(concept.edit.values[name], own + expected.added[name], rtol=1e-4, atol=1e-4)
    cosine = torch.nn.functional.cosine_similarity(concept.edit.target_input, met, dim=0)
    assert cosine > 0.9 and not torch.equal(concept.edit.target_input, concept.edit.super_input)


def test_its_file_is_no_larger_than_a_perfusion_concept(domain, photos, model, clip, vae):
    recipe = EditRecipe("<mine>", "cat", steps=1, learning_rate=0.01, batch_size=1, seed=5, own_masks=False)
    plain = learn_word(model, clip, vae, photos, recipe, QUIET, method_of=partial(EditMethod, METRIC, "toy")).concept
    tuned = edited(domain, photos, model, clip, vae, 1)
    assert shapes_of(tuned) == shapes_of(plain)
    assert abs(len(to_bytes(tuned)) - len(to_bytes(plain))) < 1000  # thumbnails compress differently


def shapes_of(concept):
    return {name: tensor.shape for name, tensor in load_tensors(to_bytes(concept)).items()}


@pytest.mark.parametrize("tune", [edited, whole])
def test_every_picture_counts(domain, model, clip, vae, tune):
    first, second = torch.rand(2, 1, 64, 64, 3, generator=torch.Generator().manual_seed(4))
    one, both, other = (tune(domain, gather(pictures), model, clip, vae, 2).words[0].vectors["clip_l"]
                        for pictures in ([first], [first, second], [first, 1 - second]))
    assert not torch.equal(one, both) and not torch.equal(both, other)


def test_tuning_moves_word_and_values(domain, photos, model, clip, vae):
    start, tuned = (edited(domain, photos, model, clip, vae, steps, learning_rate=0.01) for steps in (0, 2))
    assert not torch.equal(start.words[0].vectors["clip_l"], tuned.words[0].vectors["clip_l"])
    assert not any(torch.equal(start.edit.values[name], value) for name, value in tuned.edit.values.items())
    assert start.metadata["modelspec.architecture"] == "SD15/e4t-perfusion"
    assert len(to_bytes(tuned)) > 1000  # an ordinary concept file


def test_the_whole_starts_as_a_share_of_the_domain_and_adds_nothing(domain, photos, model, clip, vae):
    concept = whole(domain, photos, model, clip, vae, 0)
    for layer, offset in domain.offsets.items():
        found = concept.edit.offsets[layer]
        torch.testing.assert_close(found.left @ found.right, Encoder.kept * offset.left @ offset.right)
    assert not any(added.up.any() for added in concept.edit.added.values())


def test_the_whole_learns_all_of_it_and_leaves_the_model(domain, photos, model, clip, vae):
    before = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    encoder = {name: tensor.clone() for name, tensor in domain.encoder.state_dict().items()}
    start, concept = (whole(domain, photos, model, clip, vae, steps) for steps in (0, 2))
    assert not torch.equal(start.words[0].vectors["clip_l"], concept.words[0].vectors["clip_l"])
    assert not any(torch.equal(offset.left, domain.offsets[layer].left)
                   for layer, offset in concept.edit.offsets.items())
    assert all(bool(added.up.any()) for added in concept.edit.added.values())
    assert any(layer.endswith("to_out.0") for layer in concept.edit.added)
    assert all(torch.equal(weight, before[name]) for name, weight in model.model.state_dict().items())
    assert all(torch.equal(tensor, encoder[name]) for name, tensor in domain.encoder.state_dict().items())
    assert not any("forward" in vars(module) for module in model.model.modules())


def test_what_is_added_to_the_word_moves_at_a_rate_of_its_own(domain, photos, model, clip, vae):
    start, moved = (whole(domain, photos, model, clip, vae, steps, learning_rate=0.0) for steps in (0, 1))
    step = (moved.words[0].vectors["clip_l"] - start.words[0].vectors["clip_l"]).abs()
    size = row_size(rows(clip, "cat")["clip_l"])
    longest = Encoder.kept * Encoder.word_rate * size  # Adam's first step
    assert 0.2 * longest < step.max() < 1.001 * longest
    for layer, offset in moved.edit.offsets.items():
        torch.testing.assert_close(offset.left, start.edit.offsets[layer].left)


@pytest.mark.parametrize("steps", [1, 5, 50])
def test_all_steps_together_move_the_word_only_so_far(domain, model, clip, photos, steps):
    latents = torch.zeros(1, 1, 4, 8, 8)
    with private_copies(model, clip) as (unet, text):
        method = TunedWhole(domain, photos, unet, text, whole_recipe(domain, "<mine>", steps, 5),
                            Lessons(latents, None, ("",)))
        rate = method.parameters()[-1]["lr"]
        method.installed.close()
    farthest = min(WORD_PATH, Encoder.word_rate * steps)
    assert rate * steps == pytest.approx(farthest * row_size(rows(clip, "cat")["clip_l"]))


def test_the_whole_is_kept_as_a_share_of_what_was_learned(domain, photos, model, clip, vae):
    """The loss in training is that of the model patched with all that was learned, under the whole word's encoding."""
    latents = torch.randn(1, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with private_copies(model, clip) as (unet, text):
        settings = whole_recipe(domain, "<mine>", 5, 5, sentences=("a {}",), own_masks=False)
        method = TunedWhole(domain, photos, unet, text, settings, Lessons(latents, None, ("",)))
        for added in method.added.values():
            added.up.data.normal_(generator=torch.Generator().manual_seed(2))
        batch = draw(latents, 1000, 1, 0, 0)
        with torch.no_grad():
            found = method.loss(batch)
            batch = replace(batch, timesteps=later(batch.timesteps, 1000, Encoder.times))
            method.acting = False
            said = method.predictor.predict(method.seen, batch.latents, batch.noise, batch.timesteps)
            vectors = {name: v[0] for name, v in method.predictor.words(said).items()}
        concept = method.concept({})
        for name, v in vectors.items():
            concept.words[0].vectors[name].copy_(v.lerp(method.predictor.rows[name], 1 - Encoder.kept))
        method.installed.close()
    tuned, taught = apply_tuned(model, clip, concept, 1 / Encoder.kept)
    with private_copies(tuned, taught) as (unet, text), torch.no_grad():
        expected = denoising_error(unet.model, batch.latents, batch.noise, batch.timesteps,
                                   encode(text, "a <mine>")[0], None).mean()
    torch.testing.assert_close(found[0], expected, rtol=1e-3, atol=1e-4)


def test_the_whole_is_tuned_where_the_thing_is(domain, photos, model, clip):
    with private_copies(model, clip) as (unet, text):
        latents = torch.randn(1, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        method = TunedWhole(domain, photos, unet, text, whole_recipe(domain, "<mine>", 5, 5),
                            Lessons(latents, None, ("",)))
        method.installed.close()
    assert sorted(method.weights.unique().tolist()) == [pytest.approx(0.02), 1]


@pytest.mark.parametrize("tune", [edited, whole])
def test_a_stopped_tuning_is_not_resumed_with_another_domain(domain, photos, model, clip, vae, output, tune):
    """Such as one of the same class word that was pretrained once more under the same name."""
    other = replace(domain, encoder=copy.deepcopy(domain.encoder))
    next(iter(other.encoder.words.values())).weight.data *= -1
    states = output / "concepts" / "states"
    comfy.utils.set_progress_bar_global_hook(
        lambda value, total, *_, **__: comfy.model_management.interrupt_current_processing(total == 3 and value == 1))
    tune(domain, photos, model, clip, vae, 3, keeping=Keeping(every=1))
    stopped = sorted(path.name for path in states.iterdir())
    comfy.utils.set_progress_bar_global_hook(None)
    comfy.model_management.interrupt_current_processing(False)
    fresh, again = (tune(other, photos, model, clip, vae, 3, keeping=keeping) for keeping in (None, Keeping(every=1)))
    assert torch.equal(again.words[0].vectors["clip_l"], fresh.words[0].vectors["clip_l"])
    assert sorted(path.name for path in states.iterdir()) == stopped != []
    tune(domain, photos, model, clip, vae, 3, keeping=Keeping(every=1))
    assert not list(states.iterdir())


def test_strength_zero_is_the_model_itself(domain, photos, model, clip, vae):
    concept = whole(domain, photos, model, clip, vae, 0)
    assert apply_tuned(model, clip, concept, 0.0) == (model, clip)
    assert apply_offsets(model, domain, 0.0) is model
    assert apply_offsets(model, domain, 0.5).patches.keys() == {
        f"diffusion_model.{layer}.weight" for layer in domain.offsets}


def test_a_concept_on_the_model_is_refused_again(domain, photos, model, clip, vae):
    concept = whole(domain, photos, model, clip, vae, 0)
    tuned, taught = apply_tuned(model, clip, concept, 0.5)
    with pytest.raises(ValueError, match="<mine> is already on this model; apply each concept once") as error:
        apply_tuned(tuned.clone(), taught, replace(concept), 0.5)
    assert "\n" not in str(error.value)
    for placeholder, said in (("<MINE>", ";"), ("<other>", " as <mine>;")):
        renamed = replace(concept, words=(replace(concept.words[0], placeholder=placeholder),))
        with pytest.raises(ValueError, match=f"^{placeholder} is already on this model{said} apply each concept once"):
            apply_tuned(tuned, taught, renamed, 0.5)
    apply_tuned(model, clip, concept, 0.5)


def test_another_base_is_one_sentence(domain, photos, model, clip, vae, other_base):
    name, other, other_clip = other_base
    if name == "SD20":
        pytest.skip("the toys of SD1.x and SD2.x have the same matrices")
    concept = whole(domain, photos, model, clip, vae, 0)
    for use in (lambda: apply_tuned(other, other_clip, concept, 1.0), lambda: apply_offsets(other, domain, 1.0)):
        with pytest.raises(ValueError, match="SD15.*load a checkpoint of that base"):
            use()


def test_what_is_saved_is_loaded(domain, photos, model, clip, vae, tmp_path):
    concept = whole(domain, photos, model, clip, vae, 1)
    read = difference_file.load(difference_file.save(concept, tmp_path, "mine"))
    assert read.words[0].placeholder == "<mine>" and read.words[0].class_word == "cat"
    assert difference_file.to_bytes(read) == difference_file.to_bytes(concept)
    for layer, added in concept.edit.added.items():
        torch.testing.assert_close(read.edit.added[layer].up, added.up, rtol=1e-3, atol=1e-4)
    assert difference_file.load(tmp_path / "mine.safetensors", "<other>").words[0].placeholder == "<other>"


WRONG = {
    "names no such kind": lambda header, held: header.pop("concepts.kind"),
    "update ComfyUI-Concepts": lambda header, held: header.update({"concepts.format": "2"}),
    "holds no whole word": lambda header, held: held.pop("word.clip_l"),
    "do not go together": lambda header, held: held.pop(next(name for name in held if name.startswith("up."))),
    "it holds a tensor": lambda header, held: held.update({"other": torch.zeros(1, 1)}),
    "not finite": lambda header, held: held.update({"word.clip_l": torch.full((1, WIDTH), torch.nan)}),
    "of the shape": lambda header, held: held.update({"word.clip_l": torch.zeros(WIDTH)}),
}


@pytest.mark.parametrize("said", WRONG)
def test_damaged_files_are_one_sentence(domain, photos, model, clip, vae, said):
    header, held = difference_file.parsed(difference_file.to_bytes(whole(domain, photos, model, clip, vae, 0)), "it")
    WRONG[said](header, held)
    data = difference_file.with_metadata(difference_file.safetensors.torch.save(held), header)
    with pytest.raises(ValueError, match=said):
        difference_file.from_bytes(data, "bad.safetensors")


def learner(domain, clip, photos, whole, steps=1):
    """How the one or the other result is learned, and the recipe."""
    if whole:
        return partial(TunedWhole, domain, photos), whole_recipe(domain, "<mine>", steps, 0)
    return partial(TunedEdit, domain, photos, METRIC, "toy"), tuning_recipe(domain, clip, "<mine>", steps, 0)


@pytest.mark.parametrize("whole", [False, True])
def test_five_trainings_hold_what_two_held(model, clip, vae, photos, domain, whole):
    method, recipe = learner(domain, clip, photos, whole)
    assert max(grown(lambda: learn_word(model, clip, vae, photos, recipe, QUIET, method_of=method), 2, 5)) <= 0


@pytest.mark.parametrize("whole", [False, True])
def test_cancel_while_the_outcome_is_read_loses_nothing(model, clip, vae, photos, domain, whole, monkeypatch):
    """The host's layers hear it, and the steps are all done."""

    def train(*given):
        losses = own(*given)
        comfy.model_management.interrupt_current_processing(True)
        return losses

    own = concepts_pack.textual_inversion.train.train
    monkeypatch.setattr(concepts_pack.textual_inversion.train, "train", train)
    method, recipe = learner(domain, clip, photos, whole, steps=2)
    lesson = learn_word(model, clip, vae, photos, recipe, QUIET, method_of=method)
    assert len(lesson.losses) == 2 and lesson.concept.edit is not None


@pytest.mark.parametrize("whole", [False, True])
def test_eight_bits_with_memory_saved(model, clip, vae, photos, domain, whole):
    method, recipe = learner(domain, clip, photos, whole)
    with torch.inference_mode():
        stored = stored_as(FP8, model)
        lesson = learn_word(stored, clip, vae, photos, recipe, QUIET, recompute=True, method_of=method)
    assert torch.tensor(lesson.losses).isfinite().all()


def test_saving_memory_keeps_no_changed_matrices(model, clip, photos, domain):
    shapes, latents = set(matrix_shapes(model, ALL_PARTS).values()), torch.randn(2, 1, 4, 8, 8)
    settings = whole_recipe(domain, "<mine>", 5, 5, sentences=("a {}",), own_masks=False)
    kept = {}
    for recompute in (False, True):
        with private_copies(model, clip, recompute) as (unet, text):
            method = TunedWhole(domain, photos, unet, text, settings, Lessons(latents, None, ("", "")))
            saved = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.shape), lambda t: t):
                method.loss(draw(latents, 1000, 1, 0, 0))
        kept[recompute] = sum(tuple(shape) in shapes for shape in saved)
    assert kept[False] - kept[True] >= len(method.added)


def test_samples_behind_a_compiled_model_show_what_is_learned(model, clip, vae, photos, domain):
    """The host's wrapper would put the compiled UNet in place of the one that is trained."""
    compiled = model.clone()
    set_torch_compile_wrapper(compiled, backend="eager")
    method, recipe = learner(domain, clip, photos, whole=True)
    sheets = [learn_word(each, clip, vae, photos, recipe, QUIET, method_of=method).sheet for each in (model, compiled)]
    assert sheets[0].tobytes() == sheets[1].tobytes()


@pytest.fixture
def toy_photos():
    return gather([torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(4))])


@pytest.mark.parametrize("tune", [edited, whole])
def test_pictures_of_other_things_are_told(domain, model, clip, vae, tune, monkeypatch, tmp_path):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    told = []
    monkeypatch.setattr(f"concepts_pack.e4t.{'tune' if tune is edited else 'tune_whole'}.tell_strangers",
                        lambda predictor, latents, words, seed: told.append((len(latents), len(words))))
    tune(domain, gather([torch.rand(2, 64, 64, 3)]), model, clip, vae, 0)
    assert told == [(2, 2)]


def test_the_whole_is_held_near_the_class_word(domain, toy_photos, model, clip, monkeypatch):
    latents = torch.randn(1, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with private_copies(model, clip) as (unet, text), torch.no_grad():
        method = TunedWhole(domain, toy_photos, unet, text, whole_recipe(domain, "<mine>", 5, 5, own_masks=False),
                            Lessons(latents, None, ("",)))
        batch, found = draw(latents, 1000, 1, 0, 0), []
        for weight in (0.0, 100.0):
            monkeypatch.setattr(tune_whole, "REGULARISER", weight)
            found.append(method.loss(batch))
        moved = replace(batch, timesteps=later(batch.timesteps, 1000, Encoder.times))
        method.acting = False
        size = method.predictor.size(method.predictor.predict(method.seen, moved.latents, moved.noise, moved.timesteps))
        method.installed.close()
    torch.testing.assert_close(found[1] - found[0], 100 * size, rtol=1e-3, atol=1e-2)


def test_the_encoder_is_tuned_more_gently_than_the_factors(domain, toy_photos, model, clip):
    with private_copies(model, clip) as (unet, text):
        method = TunedWhole(domain, toy_photos, unet, text, whole_recipe(domain, "<mine>", 5, 5, own_masks=False),
                            Lessons(torch.zeros(1, 1, 4, 8, 8), None, ("",)))
        encoder, factors, *_ = (group["lr"] for group in method.parameters())
        method.installed.close()
    assert (encoder, factors) == (pytest.approx(Encoder.tuning_rate * 2e-3), 2e-3)


@pytest.mark.parametrize(("steps", "rate"), [(0, 2e-3), (5, 2e-3), (10, 2e-3), (20, 1e-3), (40, 5e-4), (100, 5e-4)])
def test_many_steps_move_the_factors_more_slowly(domain, steps, rate):
    assert whole_recipe(domain, "<mine>", steps, 5).learning_rate == pytest.approx(rate)


def test_a_step_of_the_whole_looks_at_the_picture_sixteen_times(domain):
    recipe = whole_recipe(domain, "<mine>", 5, 5)
    assert recipe.batch_size * recipe.accumulation == 16


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_a_prediction_is_as_large_as_the_domain_says(domain, toy_photos, model, clip, scale):
    latents = torch.zeros(1, 1, 4, 8, 8)
    with private_copies(model, clip) as (unet, text):
        recipe = tuning_recipe(domain, text, "<mine>", 5, 5, own_masks=False)
        starts = []
        for known in (domain, replace(domain, scale=scale)):
            method = TunedEdit(known, toy_photos, METRIC, "toy", unet, text, recipe, Lessons(latents, None, ("",)))
            starts.append(method.word().vectors["clip_l"] - rows(clip, "cat")["clip_l"])
            method.installed.close()
    torch.testing.assert_close(starts[1], scale * starts[0], rtol=1e-4, atol=1e-5)


def test_samples_of_the_whole_are_drawn_with_its_difference(domain, model, clip, vae, monkeypatch, tmp_path):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    heard, sample = [], concepts_pack.textual_inversion.train.sample_picture
    monkeypatch.setattr(concepts_pack.textual_inversion.train, "sample_picture",
                        lambda model, *given: heard.append(len(model.patches)) or sample(model, *given))
    made = whole(domain, gather([torch.rand(1, 64, 64, 3)]), model, clip, vae, 1)
    assert len(heard) == 2 and set(heard) == {len(made.edit.added)}


def test_an_earlier_concept_is_refused_again_too(domain, photos, model, clip, vae):
    one = whole(domain, photos, model, clip, vae, 0)
    two = replace(one, words=(replace(one.words[0], placeholder="<two>"),), edit=scaled(one.edit, 0.5))
    tuned, taught = apply_tuned(*apply_tuned(model, clip, one, 0.5), two, 0.5)
    with pytest.raises(ValueError, match="^<mine> is already on this model;"):
        apply_tuned(tuned, taught, one, 0.5)


@pytest.mark.parametrize(("result", "kind"), [("concept", TunedEdit), ("tuned model", TunedWhole)])
def test_every_widget_reaches_a_tuning(domain, model, clip, vae, monkeypatch, result, kind):
    monkeypatch.setattr("concepts_pack.nodes.tune_e4t.learn_word", told)
    monkeypatch.setattr("concepts_pack.nodes.tune_e4t.precision", lambda clip: torch.eye(WIDTH))
    with pytest.raises(Told) as heard:
        run("ConceptsTuneE4T", **inputs_of(
            "ConceptsTuneE4T", domain=domain, model=model, clip=clip, vae=vae, images=torch.rand(1, 64, 64, 3),
            placeholder=" <two> ", steps=7, seed=3, result=result))
    recipe, method = heard.value.args[4], heard.value.args[-1]
    assert (recipe.placeholder, recipe.init_text, recipe.steps, recipe.seed) == ("<two>", "cat", 7, 3)
    assert method.func is kind


def test_a_tuned_model_on_another_prediction_is_told(domain, photos, model, clip, vae, caplog):
    tuned = whole(domain, photos, model, clip, vae, 0)
    apply_tuned(model, clip, tuned, 1.0)
    assert "predicts" not in caplog.text
    apply_tuned(ModelSamplingDiscrete().patch(model, "v_prediction", False)[0], clip, tuned, 1.0)
    assert "<mine> was learned on a model that predicts epsilon, and this one predicts v;" in caplog.text
