"""A whole training on toy models: it learns, it repeats itself, it stops well, and it leaves everything else alone."""

import base64
import io
import json
import logging

import comfy.cli_args
import comfy.ldm.modules.attention
import comfy.model_management
import comfy.utils
import concepts_pack.textual_inversion.train
import folder_paths
import pytest
import torch
from concepts_pack.host.copies import private_copies
from concepts_pack.host.objective import denoising_error
from concepts_pack.host.pictures import sample_picture
from concepts_pack.host.progress import Cancelled, warned
from concepts_pack.host.text import encode, rows
from concepts_pack.textual_inversion.file import load, to_bytes
from concepts_pack.textual_inversion.train import Preview, Recipe, Watcher, WordMethod, learn_word
from concepts_pack.training.dataset import Lessons, gather
from concepts_pack.training.draws import draw
from concepts_pack.training.loop import Diverged, NoGradient, Plan, train
from concepts_pack.training.optimisers import learning_rate_factor
from concepts_pack.training.preview import _evenly
from PIL import Image

QUICK = Preview(every=2, steps=1)


def recipe(**changes):
    return Recipe(**{"placeholder": "<mine>", "init_text": "cat", "steps": 4, "learning_rate": 0.01, "batch_size": 2,
                     "seed": 5, **changes})


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path


@pytest.fixture
def hook():
    """Sets the function that hears of progress, as the server's does."""
    yield comfy.utils.set_progress_bar_global_hook
    comfy.utils.set_progress_bar_global_hook(None)
    comfy.model_management.interrupt_current_processing(False)


def mean_loss(method, latents, steps):
    with torch.no_grad():
        return torch.cat([method.loss(draw(latents, 1000, 4, 123, step)) for step in range(steps)]).mean().item()


def test_it_learns(velocity_model, clip):
    latents = torch.randn(1, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with private_copies(velocity_model, clip) as (unet, text):
        settings = recipe(vectors=4, learning_rate=0.03, steps=40, sentences=("{}",))
        method = WordMethod(unet, text, settings, Lessons(latents, None, ("",)))
        before = mean_loss(method, latents, 8)
        train(method, latents, Plan(steps=40, batch_size=4, seed=0, levels=1000), lambda losses: None)
        assert mean_loss(method, latents, 8) < before * 0.95


def test_same_seed_same_file_and_other_seed_another(model, clip, vae, photos):
    with torch.inference_mode():
        first, again, other = (learn_word(model, clip, vae, gather([photos]), recipe(seed=s), QUICK) for s in (5, 5, 6))
    assert to_bytes(first.concept) == to_bytes(again.concept) != to_bytes(other.concept)
    assert first.losses == again.losses != other.losses and len(first.losses) == 4
    assert first.sheet.tobytes() == again.sheet.tobytes()


def test_previews_do_not_change_what_is_learned(model, clip, vae, photos):
    views = QUICK, Preview(every=0, steps=2)
    often, never = (learn_word(model, clip, vae, gather([photos]), recipe(), view) for view in views)
    assert torch.equal(*(lesson.concept.words[0].vectors["clip_l"] for lesson in (often, never)))


def test_a_preview_prompt_of_several_lines_is_drawn(model, clip, vae, photos):
    views = [Preview(every=2, steps=1, prompt=prompt) for prompt in ("a photo of a {}\nin the snow\n", "a {}")]
    sheets = [learn_word(model, clip, vae, gather([photos]), recipe(), view).sheet for view in views]
    assert sheets[0].size == sheets[1].size


def test_base_weights_keep_every_bit(model, clip, vae, photos):
    parts = [model.model, clip.cond_stage_model, vae.first_stage_model]
    before = [{k: v.clone() for k, v in part.state_dict().items()} for part in parts]
    learn_word(model, clip, vae, gather([photos]), recipe(), QUICK)
    for part, saved in zip(parts, before, strict=True):
        assert all(torch.equal(saved[k], v) for k, v in part.state_dict().items())


def test_captions_are_what_their_photo_is_learned_under(model, clip, vae, photos):
    lessons = Lessons(torch.randn(2, 1, 4, 8, 8), None, ("a cat on grass", ""))
    with private_copies(model, clip) as (unet, text), torch.no_grad():
        method = WordMethod(unet, text, recipe(sentences=("my {}",)), lessons)
        batch = draw(lessons.latents, 1000, 2, 0, 0)
        together = method.loss(batch)
        for sample, photo in enumerate(batch.photos):
            method.captions = [["a {} on grass", "my {}"][photo]] * 2
            torch.testing.assert_close(method.loss(batch)[sample], together[sample], rtol=1e-4, atol=1e-5)


def test_masks_weigh_the_loss(model, clip):
    latents, weights = torch.randn(2, 3, 4, 8, 8), torch.rand(2, 3, 1, 8, 8)
    with private_copies(model, clip) as (unet, text), torch.no_grad():
        method = WordMethod(unet, text, recipe(sentences=("my {}",)), Lessons(latents, weights, ("", "")))
        batch = draw(latents, 1000, 2, 0, 0)
        context, _ = encode(method.clip, "my <mine>")
        error = denoising_error(unet.model, batch.latents, batch.noise, batch.timesteps, context, None)
        for sample, loss in enumerate(method.loss(batch)):
            weight = weights[batch.photos[sample], batch.views[sample]].expand(4, 8, 8)
            torch.testing.assert_close(loss, (error[sample] * weight).sum() / weight.sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{"accumulation": 3}, {"schedule": "constant"}, {"warmup": 3}, {"snr_cap": 5.0},
                                     {"optimiser": "SGD"}, {"crops": 2}, {"mirror": True}, {"mask_floor": 1.0}])
def test_every_setting_matters(model, clip, vae, photos, changes):
    mask = torch.zeros(3, 64, 64)
    mask[:, :, :20] = 1
    plain, changed = (learn_word(model, clip, vae, gather([photos], [mask]), recipe(**c), Preview(every=0, steps=1))
                      for c in ({}, changes))
    assert not torch.equal(*(lesson.concept.words[0].vectors["clip_l"] for lesson in (plain, changed)))


def test_length_is_kept_when_asked(model, clip, vae, photos):
    free, kept = (learn_word(model, clip, vae, gather([photos]), recipe(norm_pull=pull, learning_rate=0.1), QUICK)
                  for pull in (0.0, 1.0))
    norms = [lesson.concept.words[0].vectors["clip_l"].norm().item() for lesson in (free, kept)]
    assert norms[1] == pytest.approx(rows(clip, "cat")["clip_l"].norm().item(), rel=1e-4)
    assert norms[0] != pytest.approx(norms[1], rel=1e-2)


def test_the_live_picture_is_sent(model, clip, vae, photos, hook):
    heard = []
    hook(lambda value, total, preview, **_: heard.append((value, total, preview)))
    learn_word(model, clip, vae, gather([photos]), recipe(), QUICK)
    assert [(value, total) for value, total, _ in heard if total == 4] == [(i, 4) for i in (1, 2, 3, 4)]
    kind, picture, _ = heard[-1][2]
    assert kind == "JPEG" and picture.size == (832, 448)


def test_cancel_keeps_and_returns_what_was_learned(model, clip, vae, photos, hook, output):
    hook(lambda value, *_, **__: value == 3 and comfy.model_management.interrupt_current_processing(True))
    lesson = learn_word(model, clip, vae, gather([photos]), recipe(steps=50), Preview(every=0, steps=1))
    assert 3 <= len(lesson.losses) < 50 and not comfy.model_management.processing_interrupted()
    kept = output / "concepts" / f"mine-step{len(lesson.losses)}.safetensors"
    assert to_bytes(load(kept)) == to_bytes(lesson.concept) == kept.read_bytes()


def test_cancel_before_the_first_step_stops_the_node(model, clip, vae, photos):
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(Cancelled):
        learn_word(model, clip, vae, gather([photos]), recipe(), QUICK)


def test_a_lost_loss_stops_and_keeps_the_last_good_word(model, clip, vae, photos, output):
    with pytest.raises(Diverged, match="stopped being a number at step 2; a lower learning rate .* is kept in"):
        learn_word(model, clip, vae, gather([photos]), recipe(learning_rate=1e30), Preview(every=0, steps=1))
    word, = load(output / "concepts" / "mine-step1.safetensors").words
    assert word.vectors["clip_l"].isfinite().all()


def test_attention_without_backward_is_named(model, clip, vae, photos, monkeypatch):
    attention = comfy.ldm.modules.attention.optimized_attention
    monkeypatch.setattr(comfy.ldm.modules.attention, "optimized_attention", lambda *a, **k: attention(*a, **k).detach())
    with pytest.raises(NoGradient, match="attention back end that cannot be trained through"):
        learn_word(model, clip, vae, gather([photos]), recipe(), QUICK)


def test_sage_attention_is_replaced_while_training(model, clip, vae, photos, monkeypatch):
    attention = comfy.ldm.modules.attention
    without_backward = attention.wrap_attn(lambda *a, **k: attention.attention_basic(*a, **k).detach())
    expected = learn_word(model, clip, vae, gather([photos]), recipe(), QUICK)
    monkeypatch.setattr(attention, "optimized_attention", without_backward)
    monkeypatch.setattr(comfy.cli_args.args, "use_sage_attention", True)
    lesson = learn_word(model, clip, vae, gather([photos]), recipe(), QUICK)
    torch.testing.assert_close(lesson.losses, expected.losses, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_batch_in_pieces_is_the_same_step(velocity_model, clip, accumulation):
    """What small cards do is what others do, up to rounding."""
    latents, ends = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), []
    with private_copies(velocity_model, clip) as (unet, text):
        for at_once in (0, 1, 2):
            method = WordMethod(unet, text, recipe(sentences=("{}",)), Lessons(latents, None, ("",) * 3))
            plan = Plan(2, 3, 0, 1000, accumulation, optimiser="SGD", at_once=at_once)
            losses = train(method, latents, plan, lambda losses: None)
            ends.append((torch.tensor(losses), method.leaves["clip_l"].detach()))
    start = rows(clip, "cat")["clip_l"]
    moved = [end - start for _, end in ends]
    assert moved[0].abs().max() > 0
    for (losses, _), way in zip(ends[1:], moved[1:], strict=True):
        torch.testing.assert_close(losses, ends[0][0], rtol=1e-4, atol=0)
        torch.testing.assert_close(way, moved[0], rtol=1e-2, atol=1e-3 * moved[0].abs().max().item())


@pytest.mark.parametrize(("written", "drawn"), [
    ("a {} at sea", "a <mine> at sea"), ("a cat at sea", "a <mine> at sea"), ("the sea", "<mine>, the sea"),
    ("two {}s", "two <mine>s"),
])
def test_samples_show_the_word_wherever_their_prompt_has_it(model, clip, vae, photos, monkeypatch, written, drawn):
    heard = []
    sample = concepts_pack.textual_inversion.train.sample_picture
    monkeypatch.setattr(concepts_pack.textual_inversion.train, "sample_picture",
                        lambda *given: heard.append(given[3]) or sample(*given))
    learn_word(model, clip, vae, gather([photos]), recipe(steps=1), Preview(every=0, steps=1, prompt=written))
    assert set(heard) == {drawn}


@pytest.mark.parametrize("sentence", ["a {}-themed room", "{}s on a table"])
def test_a_sentence_that_hides_the_word_is_refused(model, clip, vae, photos, sentence):
    """Nothing would be learned under it; a word in brackets stands out anyhow."""
    with pytest.raises(ValueError, match="ohwx is not a word of its own in"):
        learn_word(model, clip, vae, gather([photos]), recipe(placeholder="ohwx", sentences=(sentence,)), QUICK)
    learn_word(model, clip, vae, gather([photos]), recipe(steps=1, sentences=(sentence,)), QUICK)


def test_a_cancelled_training_records_the_steps_it_did(model, clip, vae, photos, hook):
    hook(lambda value, *_, **__: value == 3 and comfy.model_management.interrupt_current_processing(True))
    lesson = learn_word(model, clip, vae, gather([photos]), recipe(steps=50), Preview(every=0, steps=1))
    assert json.loads(lesson.concept.metadata["concepts.training"])["steps_done"] == len(lesson.losses) < 50


def test_the_cover_is_the_last_sample(model, clip, vae, photos, monkeypatch):
    shades = iter((0, 100, 200))
    monkeypatch.setattr(Watcher, "sample", lambda watcher, label: watcher.samples.append(
        (label, Image.new("RGB", (64, 64), (next(shades),) * 3))))
    concept = learn_word(model, clip, vae, gather([photos]), recipe(), QUICK).concept
    (cover,) = json.loads(concept.metadata["ssmd_cover_images"])
    assert Image.open(io.BytesIO(base64.b64decode(cover))).getpixel((32, 32))[0] == pytest.approx(200, abs=3)


def test_resolution_matters(model, clip, vae, photos):
    plain, changed = (learn_word(model, clip, vae, gather([photos]), recipe(steps=1, **c), Preview(every=0, steps=1))
                      for c in ({}, {"resolution": 128}))
    assert not torch.equal(*(lesson.concept.words[0].vectors["clip_l"] for lesson in (plain, changed)))
    assert json.loads(changed.concept.metadata["concepts.training"])["side"] == 128


@pytest.mark.parametrize("vectors", [1, 3])
def test_the_init_text_is_looked_for_where_it_stands(model, clip, vectors):
    with private_copies(model, clip) as (unet, text):
        method = WordMethod(unet, text, recipe(vectors=vectors, init_text="tabby cat"),
                            Lessons(torch.zeros(1, 1, 4, 8, 8), None, ("",)))
        assert method.init_places("a photo of a {} at sea") == [5, 6]


def test_every_sentence_is_learned_under(model, clip):
    sentences, latents = ("a {}", "my {}", "one {}"), torch.zeros(1, 1, 4, 8, 8)
    with private_copies(model, clip) as (unet, text):
        method = WordMethod(unet, text, recipe(sentences=sentences), Lessons(latents, None, ("",)))
        heard = {method.prompts(draw(latents, 1000, 1, 0, step))[0] for step in range(30)}
    assert heard == {"a <mine>", "my <mine>", "one <mine>"}


class Recorder:
    """A method of one number that keeps the batches it is given."""

    def __init__(self):
        self.number, self.given = torch.zeros(1, requires_grad=True), []

    def parameters(self):
        return [{"params": [self.number], "lr": 0.0}]

    def loss(self, batch):
        self.given.append(batch)
        return (self.number + 2).expand(len(batch.latents)) * (1 + batch.timesteps / 1000)

    def after_step(self):
        pass


@pytest.mark.parametrize("at_once", [0, 1])
def test_a_step_of_several_batches_is_their_mean(at_once):
    latents = torch.zeros(2, 1, 4, 8, 8)
    method = Recorder()
    losses = train(method, latents, Plan(2, 2, 0, 1000, accumulation=3, at_once=at_once), lambda losses: None)
    batches = [draw(latents, 1000, 2, 0, number) for number in range(6)]
    assert torch.equal(torch.cat([given.noise for given in method.given]), torch.cat([b.noise for b in batches]))
    expected = torch.stack([2 + b.timesteps / 500 for b in batches]).view(2, -1).mean(1)
    assert losses == pytest.approx(expected.tolist())


@pytest.mark.parametrize(("schedule", "middle", "end"), [
    ("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1, 1),
])
def test_rates_fall_to_a_tenth_after_a_ramp(schedule, middle, end):
    assert [learning_rate_factor(schedule, 0, step, 101) for step in (0, 50, 100)] == pytest.approx([1, middle, end])
    assert [learning_rate_factor("constant", 3, step, 101) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]


def test_the_page_shows_the_first_and_the_last_sample():
    assert _evenly(range(3), 10) == [0, 1, 2]
    shown = _evenly(range(23), 10)
    assert len(shown) == 10 and (shown[0], shown[-1]) == (0, 22) and shown == sorted(set(shown))


def test_samples_depend_on_seed_and_guidance(model, clip, vae):
    drawn = [sample_picture(model, clip, vae, "a cat", (4, 8, 8), cfg, 1, seed)
             for cfg, seed in ((1.0, 0), (5.0, 0), (1.0, 1))]
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.stack(drawn).isfinite().all()


def test_a_warning_that_comes_again_is_said_once():
    log = logging.getLogger("concepts")
    with warned() as sentences:
        for number in (1, 1, 2):
            log.warning("step %d", number)
        log.info("no warning")
    log.warning("behind")
    assert sentences == ["step 1", "step 2"]


def test_samples_are_drawn_as_often_as_asked(model, clip, vae, photos, monkeypatch, tmp_path):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    labels, own = [], concepts_pack.textual_inversion.train.Watcher.sample
    monkeypatch.setattr(concepts_pack.textual_inversion.train.Watcher, "sample",
                        lambda watcher, label: labels.append(label) or own(watcher, label))
    learn_word(model, clip, vae, gather([photos]), recipe(steps=5), Preview(every=2, steps=1))
    assert labels == ["step 0: cat", "step 2", "step 4", "step 5"]
