"""Pretraining on toys: it learns, resumes bit for bit, is shared by processes, and says what is wrong with a folder."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import comfy.model_management
import concepts_pack.e4t.learner
import concepts_pack.e4t.pretrain
import folder_paths
import pytest
import torch
from concepts_pack.e4t import method as method_module
from concepts_pack.e4t.domain import digest, load, save
from concepts_pack.e4t.encoder import Encoder, Shape
from concepts_pack.e4t.learner import Learner, is_edited, shape_of
from concepts_pack.e4t.method import PLACEHOLDER, SENTENCES, Predictor, Together
from concepts_pack.e4t.offsets import Offset, new_offsets, penalty
from concepts_pack.e4t.pretrain import Keeping, _run, parser, pretrain, run
from concepts_pack.e4t.recognition import recognise
from concepts_pack.e4t.samples import Samples, draw_pair, later, read_samples
from concepts_pack.e4t.validation import STEPS, Look, errors, pictures
from concepts_pack.e4t.workers import Workers
from concepts_pack.host.copies import private_copies
from concepts_pack.host.cross_attention import cross_attentions
from concepts_pack.host.pictures import sample_picture
from concepts_pack.host.progress import Cancelled
from concepts_pack.host.text import encode as encode_text
from concepts_pack.host.text import fingerprint_of
from concepts_pack.host.weight_offsets import attention_matrices
from concepts_pack.perfusion.apply import Applied, Call
from concepts_pack.perfusion.concept import Edit
from concepts_pack.textual_inversion.templates import fill
from concepts_pack.training.dataset import weighted_mean
from PIL import Image

from . import ranks
from .conftest import WIDTH, Told, told
from .test_e4t_domain import domain as toy_domain

METRIC = torch.eye(WIDTH)
RECIPE, SAMPLES = ranks.RECIPE, ranks.samples()


def learn(model, clip, folder, watch=lambda step, loss: None, **changes):
    return pretrain(model, clip, SAMPLES, replace(RECIPE, **changes), Keeping(folder), METRIC, watch=watch)


def test_it_learns(model, clip, tmp_path):
    losses = []
    learn(model, clip, tmp_path, lambda step, loss: losses.append(loss), steps=24, rate=5e-3, offset_rate=5e-3,
          regulariser=0.0)
    assert sum(losses[-8:]) < sum(losses[:8])


def test_what_it_leaves(model, clip, tmp_path):
    before = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    domain = learn(model, clip, tmp_path)
    assert (domain.word, domain.base) == ("cat", "SD15")
    assert all(bool(o.left.any()) and len(o.left.T) == 3 for o in domain.offsets.values()) and domain.offsets
    assert bool(domain.encoder.words["clip_l"].weight.any()) and bool(domain.encoder.values.weight.any())
    record = json.loads(domain.metadata["concepts.training"])
    assert record["steps_done"] == 5 and record["subjects"] == 6
    assert all(torch.equal(weight, before[name]) for name, weight in model.model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.model.modules())


def test_without_offsets(model, clip, tmp_path):
    assert learn(model, clip, tmp_path, offsets=False, steps=2).offsets == {}


class Stop(Exception):
    pass


def test_stopped_and_started_again_it_ends_the_same(model, clip, tmp_path):
    def stop(step, loss):
        if step == 3:
            raise Stop

    with pytest.raises(Stop):
        learn(model, clip, tmp_path / "a", stop)
    heard = []
    resumed = learn(model, clip, tmp_path / "a", lambda step, loss: heard.append(step))
    assert heard == [4, 5]
    whole, resumed = learn(model, clip, tmp_path / "b"), resumed
    for name, tensor in whole.encoder.state_dict().items():
        assert torch.equal(tensor, resumed.encoder.state_dict()[name]), name
    again = []
    learn(model, clip, tmp_path / "b", lambda step, loss: again.append(step), steps=7)
    assert again == [6, 7]  # more steps go on from the end


@contextmanager
def learner_of(model, clip, recompute=False, **changes):
    with private_copies(model, clip, recompute) as (unet, text):
        learner = Learner(unet, text, replace(RECIPE, **changes), METRIC, SAMPLES, None)
        for layer in (*learner.encoder.words.values(), learner.encoder.values):
            torch.nn.init.normal_(layer.weight, std=0.1)
        with learner.predictor.installed:
            yield learner


def steps(learner, count):
    return [learner.step([draw_pair(SAMPLES, 1000, 4, 0, step)], step, 0.0, Workers(), bf16=False)
            for step in range(count)]


def test_the_average_is_mostly_what_it_was_only_later(model, clip):
    with learner_of(model, clip) as learner:
        before = [mean.clone() for mean in learner.mean]
        steps(learner, 1)
        expected = [old.lerp(new.detach(), 0.9) for old, new in zip(before, learner.trained, strict=True)]
        torch.testing.assert_close(learner.mean, expected)


@pytest.mark.parametrize("edited", [True, False])
def test_the_regulariser_is_the_mean_square_of_what_is_predicted(model, clip, edited):
    with learner_of(model, clip) as learner, torch.no_grad():
        pair = draw_pair(SAMPLES, 1000, 2, 0, 0)
        said = learner.predictor.predict(pair.pictures, pair.latents, pair.noise, pair.timesteps)
        size = said.words["clip_l"].square().mean(1)
        if edited:
            size = size + torch.cat(list(said.values.values()), 1).square().mean(1)
        with_it, without = (learner.predictor.loss(pair, edited, weight) for weight in (100.0, 0.0))
    torch.testing.assert_close(with_it - without, 100 * size, rtol=1e-3, atol=1e-3)


def test_predictions_are_in_root_mean_squares(model, clip):
    with learner_of(model, clip) as learner, torch.no_grad():
        predictor, pair = learner.predictor, draw_pair(SAMPLES, 1000, 2, 0, 0)
        said = predictor.predict(pair.pictures, pair.latents, pair.noise, pair.timesteps)
        row = predictor.rows["clip_l"]
        torch.testing.assert_close(predictor.words(said)["clip_l"][:, 0],
                                   row + row.square().mean().sqrt() * said.words["clip_l"], rtol=1e-3, atol=1e-4)
        context = torch.randn(2, 77, WIDTH, generator=torch.Generator().manual_seed(2))
        call = predictor._together(context, list(SENTENCES[:2]), predictor.added(said))
        for name, attention in predictor.attentions.items():
            weight = attention.to_v.weight
            unit = (weight @ predictor.super_input).square().mean().sqrt()
            own = torch.stack([weight @ context[n, predictor.places[SENTENCES[n]]] for n in range(2)])
            torch.testing.assert_close(call.learned[name], own + unit * said.values[name], rtol=1e-3, atol=1e-3)


def test_a_class_of_several_words_is_met_at_its_last(model, clip):
    word = "red brick house"
    with private_copies(model, clip) as (unet, text), torch.no_grad():
        made = Predictor(unet, text, word, Encoder(shape_of(unet, text, RECIPE)), {}, 1.0, METRIC)
        made.installed.close()
        ends = [encode_text(text, fill(sentence, word))[0][0, made.places[sentence] + 2] for sentence in SENTENCES]
    torch.testing.assert_close(made.super_input, torch.stack(ends).mean(0))


def test_weights_are_those_of_the_view_that_is_denoised():
    samples = replace(SAMPLES, weights=torch.rand(SAMPLES.weights.shape, generator=torch.Generator().manual_seed(0)))
    pair = draw_pair(samples, 1000, 4, 0, 3)
    assert torch.equal(pair.weights, samples.weights[pair.batch.photos, pair.batch.views])


def test_offsets_are_not_rounded_where_the_rest_is(model, clip):
    with learner_of(model, clip) as learner, torch.autocast("cpu", torch.bfloat16):
        name, offset = next(iter(learner.offsets.items()))
        offset.left.data.fill_(1e-3)
        weight = attention_matrices(learner.predictor.model.diffusion_model)[name].weight
        learner.predictor.offsetting = learner.offsets
        found = learner.predictor._offset(name, weight)
    torch.testing.assert_close(found, weight * (1 + offset.left @ offset.right))


@pytest.mark.parametrize("edited", [0.0, 1.0])
def test_gradient_checkpointing_changes_nothing(model, clip, edited):
    found = []
    for recompute in (False, True):
        with learner_of(model, clip, recompute, edited=edited) as learner:
            found.append((steps(learner, 2), [parameter.grad for parameter in learner.trained]))
    torch.testing.assert_close(*found)
    assert sum(bool(gradient.any()) for gradient in found[0][1] if gradient is not None) > 10


@pytest.mark.parametrize("lost", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_moves_nothing(model, clip, lost):
    with learner_of(model, clip) as learner:
        before = [parameter.clone() for parameter in learner.trained]
        hook = learner.trained[0].register_hook(lambda gradient: gradient * lost)
        steps(learner, 9)
        assert all(torch.equal(one, two) for one, two in zip(before, learner.trained, strict=True)) and learner.sound()
        with pytest.raises(ValueError, match="stopped being a number at step 1;"):
            learner.step([draw_pair(SAMPLES, 1000, 4, 0, 9)], 9, 0.0, Workers(), bf16=False)
        assert not learner.sound()
        hook.remove()
        steps(learner, 1)
        assert not torch.equal(before[0], learner.trained[0]) and learner.sound()


def test_lost_losses_are_one_sentence_and_leave_no_state_of_theirs(model, clip, tmp_path):
    with pytest.raises(ValueError, match="stopped being a number at step"):
        learn(model, clip, tmp_path, rate=1e30, steps=20)
    (before_any,) = tmp_path.iterdir()
    assert before_any.name.endswith("-step0000000.safetensors")


def assert_same_learned(expected, found):
    """They differ by far less than they learned, encoder and offsets alike."""
    torch.manual_seed(RECIPE.seed)
    start = Encoder(expected.encoder.shape)
    one, two, before = (torch.nn.utils.parameters_to_vector(encoder.parameters())
                        for encoder in (expected.encoder, found.encoder, start))
    assert (one - two).norm() < 0.01 * (one - before).norm() > 0
    before = new_offsets({name: (len(o.left), o.right.shape[1]) for name, o in expected.offsets.items()}, RECIPE.seed)
    one, two, before = (torch.cat([torch.cat([o.left.flatten(), o.right.flatten()]) for _, o in sorted(own.items())])
                        for own in (expected.offsets, found.offsets, before))
    assert (one - two).norm() < 0.01 * (one - before).norm() > 0


@pytest.mark.parametrize(("changes", "said"), [({"steps": 0}, "needs an end"), ({"word": " "}, "says nothing")])
def test_recipes_that_cannot_be(model, clip, tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        learn(model, clip, tmp_path, **changes)


def test_steps_alternate():
    assert [is_edited(step, 0.5) for step in range(4)] == [False, True, False, True]
    assert sum(is_edited(step, 0.25) for step in range(100)) == 25
    assert not any(is_edited(step, 0.0) for step in range(10))


def test_the_encoder_hears_another_view_of_the_same_subject():
    pair = draw_pair(SAMPLES, 1000, 4, 0, 3)
    for row, subject in enumerate(pair.batch.photos):
        (view,) = [v for v in range(2) if torch.equal(SAMPLES.latents[subject, v].float(), pair.latents[row])]
        assert view != pair.batch.views[row]
        torch.testing.assert_close(pair.pictures[row], SAMPLES.pictures[subject, view].float() / 255)


def test_processes_share_a_batch():
    whole = draw_pair(SAMPLES, 1000, 4, 0, 3)
    parts = [draw_pair(SAMPLES, 1000, 4, 0, 3, slice(rank, None, 2)) for rank in range(2)]
    for rank, part in enumerate(parts):
        assert torch.equal(part.batch.noise, whole.batch.noise[rank::2])
        assert torch.equal(part.pictures, whole.pictures[rank::2])


def test_a_batch_in_parts_learns_the_same(model, clip, tmp_path):
    whole, parts = (pretrain(model, clip, SAMPLES, RECIPE, Keeping(tmp_path / str(count)), METRIC, accumulation=count)
                    for count in (1, 2))
    assert_same_learned(whole, parts)
    for parts in (0, 3):
        with pytest.raises(ValueError, match=f"A batch of 4 pictures cannot be cut evenly into {parts} parts"):
            pretrain(model, clip, SAMPLES, RECIPE, Keeping(tmp_path), METRIC, accumulation=parts)


def test_parts_of_a_batch_are_all_of_it():
    whole = draw_pair(SAMPLES, 1000, 4, 0, 3)
    parts = list(whole.parts(3))
    assert [len(part.lots) for part in parts] == [3, 1] and sum((part.lots for part in parts), ()) == whole.lots
    for name in ("weights", "pictures", "latents", "noise", "timesteps"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    assert torch.equal(torch.cat([part.batch.noise for part in parts]), whole.batch.noise)


def test_later_timesteps_stay_in_the_schedule():
    moved = later(torch.tensor([0, 500, 999]), 1000, 0.6)
    assert moved.tolist() == [0, int(1000 * 0.5 ** 0.6), 999]


@pytest.fixture
def predictor(model, clip):
    with private_copies(model, clip) as (unet, text):
        torch.manual_seed(0)
        encoder = Encoder(shape_of(unet, text, RECIPE))
        for layer in (*encoder.words.values(), encoder.values):
            torch.nn.init.normal_(layer.weight, std=0.5)
        yield Predictor(unet, text, "cat", encoder, {}, 1.0, METRIC)


def test_a_batch_of_edits_is_each_edit_alone(predictor):
    """Perfusion's own edit of one sample is what each gets among others."""
    generator = torch.Generator().manual_seed(2)
    context = torch.randn(3, 5, WIDTH, generator=generator)
    attentions = cross_attentions(predictor.model.diffusion_model)
    edits = [Applied(Edit(context[row, 2], predictor.super_input,
                          {name: torch.randn(a.to_v.out_features, generator=generator)
                           for name, a in attentions.items()}), context[row, 2] @ METRIC, "<mine>")
             for row in range(3)]
    together = Together(list(attentions), edits, context)
    with torch.no_grad():
        for kind, layer in (("keys", "to_k"), ("values", "to_v")):
            for name, attention in attentions.items():
                forward = getattr(attention, layer)
                found = getattr(together, kind)(name, forward, context)
                for row in range(3):
                    alone = Call(list(attentions), [edits[row]], context[row:row + 1])
                    expected = getattr(alone, kind)(name, forward, context[row:row + 1])
                    torch.testing.assert_close(found[row:row + 1], expected, rtol=1e-4, atol=1e-4)


def test_predictions_start_from_the_class_word(predictor):
    for layer in (*predictor.encoder.words.values(), predictor.encoder.values):
        torch.nn.init.zeros_(layer.weight)
    pair = draw_pair(SAMPLES, 1000, 2, 0, 0)
    with torch.no_grad():
        said = predictor.predict(pair.pictures, pair.latents, pair.noise, pair.timesteps)
        for name, words in predictor.words(said).items():
            assert torch.equal(words, predictor.rows[name].expand(2, 1, -1))
        assert not any(added.any() for added in predictor.added(said).values())


def test_the_word_is_where_the_predictor_looks(predictor):
    texts = [fill(sentence, PLACEHOLDER) for sentence in SENTENCES]
    for text, sentence in zip(texts, SENTENCES, strict=True):
        sections = next(iter(predictor.clip.tokenize(text).values()))[0]
        assert isinstance(sections[predictor.places[sentence]][0], torch.Tensor)


def folder_of(tmp_path, *names, masks=()):
    for number, name in enumerate(names):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), (10 * number, 90, 200)).save(path)
    for name in masks:
        Image.new("L", (64, 48), 0).save(tmp_path / "pictures" / name)
    return tmp_path / "pictures"


@pytest.mark.parametrize("rate", [1e-30, 0.05])
def test_pictures_show_what_the_domain_draws(model, clip, calm_vae, tmp_path, rate):
    """Of a domain that has learned nothing yet, what the class word draws."""
    drawn = {}
    recipe = replace(RECIPE, rate=rate, offset_rate=rate, weight_decay=0.0, recognition=0)
    seen = pretrain(model, clip, SAMPLES, recipe, Keeping(tmp_path / "seen"), METRIC,
                    look=Look(calm_vae, drawn.__setitem__, cfg=3.0))
    (step, picture), = drawn.items()
    assert step == 5 and picture.shape == (128, 4 * 64, 3)
    with torch.no_grad():
        known = calm_vae.decode(model.model.process_latent_out(SAMPLES.latents[1:2, 0].float()))[0]
    torch.testing.assert_close(picture[:64, 64:128], known.clamp(0, 1))
    plain = sample_picture(model, clip, calm_vae, "a photo of a cat", (4, 8, 8), 3.0, STEPS, RECIPE.seed)
    assert torch.allclose(picture[64:, :64], plain, atol=1e-4) == (rate < 0.05)
    unseen = pretrain(model, clip, SAMPLES, recipe, Keeping(tmp_path / "unseen"), METRIC)
    assert torch.equal(*(torch.nn.utils.parameters_to_vector(domain.encoder.parameters()) for domain in (seen, unseen)))


@pytest.fixture
def output(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    return tmp_path / "output"


def test_an_unfinished_domain_goes_once_it_is_finished(model, clip, calm_vae, tmp_path, output):
    settings = {"folder": folder_of(tmp_path, "a.png", "b.png"), "checkpoint": "toy", "word": "cat", "steps": 2,
                "batch-size": 2, "resolution": 64, "side": 32, "keep-minutes": 0, "output": tmp_path / "made",
                "work": tmp_path / "work"}
    args = parser().parse_args([part for name, value in settings.items() for part in (f"--{name}", str(value))])
    path = run(args, (model, clip, calm_vae))
    assert list((tmp_path / "made").iterdir()) == [path]
    drawn = sorted((output / "concepts").glob("cat-step*.png"))
    assert [path.stem[-2:] for path in drawn] == ["01", "02"] and Image.open(drawn[0]).size == (128, 128)


def test_a_disk_that_refuses_the_unfinished_domain_stops_nothing(model, clip, calm_vae, tmp_path, output, caplog):
    (tmp_path / "made" / "cat-unfinished.safetensors").mkdir(parents=True)
    settings = {"folder": folder_of(tmp_path, "a.png", "b.png"), "checkpoint": "toy", "word": "cat", "steps": 3,
                "batch-size": 2, "resolution": 64, "side": 32, "keep-minutes": 0, "output": tmp_path / "made",
                "work": tmp_path / "work"}
    args = parser().parse_args([part for name, value in settings.items() for part in (f"--{name}", str(value))])
    made = load(run(args, (model, clip, calm_vae)))
    assert json.loads(made.metadata["concepts.training"])["steps_done"] == 3
    assert caplog.text.count("The pretraining goes on without this unfinished domain: ") == 3


def encode(pictures):
    return pictures.permute(0, 3, 1, 2)[:, :, ::8, ::8].repeat(1, 2, 1, 1)[:, :4]


def read(folder, tmp_path, views=3, seed=0):
    return read_samples(folder, views, 64, 32, True, 0.1, seed, encode, "vae", tmp_path / "work")


def test_a_folder_of_things_and_of_folders_of_things(tmp_path):
    folder = folder_of(tmp_path, "a.png", "b/1.png", "b/2.png", "b/3.png", "b/4.png")
    samples = ranks.in_memory(read(folder, tmp_path))
    assert samples.pictures.shape == (2, 3, 32, 32, 3) and samples.latents.shape == (2, 3, 4, 8, 8)
    assert samples.pictures[0, :, 5, 5, 0].tolist() == pytest.approx([10, 20, 30], abs=1)  # the folder b
    assert samples.unreadable == 0


def test_pictures_beyond_the_views_are_not_read_and_spoken_of(tmp_path, caplog):
    folder = folder_of(tmp_path, "b/1.png", "b/2.png", "b/3.png", "b/4.png", "c/1.png")
    (folder / "b" / "1.png").write_bytes(b"no picture")
    with caplog.at_level("INFO"):
        samples = ranks.in_memory(read(folder, tmp_path, views=2))
    assert samples.pictures[0, :, 5, 5, 0].tolist() == pytest.approx([10, 20], abs=1) and samples.unreadable == 1
    assert "Subjects with more than 2 pictures, of which the first 2 are learned from: 1" in caplog.messages


def test_views_of_a_thing_are_its_pictures_first(tmp_path):
    samples = ranks.in_memory(read(folder_of(tmp_path, "b/1.png", "b/2.png", "b/3.png"), tmp_path))
    assert samples.pictures[0, :, 5, 5, 0].tolist() == pytest.approx([0, 10, 20], abs=1)


def test_with_enough_pictures_every_second_one_is_mirrored(tmp_path):
    folder = tmp_path / "things" / "b"
    folder.mkdir(parents=True)
    for number in range(4):
        picture = Image.new("RGB", (64, 64))
        picture.paste((255, 0, 0), (0, 0, 32, 64))
        picture.save(folder / f"{number}.png")
    samples = ranks.in_memory(read(folder.parent, tmp_path, views=4))
    assert samples.pictures[0, :, 5, 5, 0].tolist() == [255, 0, 255, 0]


def test_unreadable_pictures_are_left_out_and_counted(tmp_path):
    folder = folder_of(tmp_path, "a.png", "b.png")
    (folder / "c.png").write_bytes(b"no picture")
    Image.new("RGB", (40, 20)).save(folder / "tiny.png")
    Image.new("1", (14000, 14000)).save(folder / "vast.png")
    for _ in range(2):  # the second time from what was kept
        samples = read(folder, tmp_path)
        assert len(samples.latents) == 2 and samples.unreadable == 3


def test_the_largest_seed_can_be_used(tmp_path):
    assert len(read(folder_of(tmp_path, "a.png", "b.png"), tmp_path, seed=2**64 - 1).latents) == 2


def test_captions_do_not_count_for_pretraining(tmp_path):
    folder = folder_of(tmp_path, "a.png", "b.png")
    (folder / "a.txt").write_text("un café", "latin-1")
    samples = read(folder, tmp_path)
    assert len(samples.latents) == 2 and samples.unreadable == 0


@pytest.mark.parametrize("broken", [False, True])
def test_folders_without_pictures_are_one_sentence(tmp_path, broken):
    (tmp_path / "pictures").mkdir()
    if broken:
        (tmp_path / "pictures" / "c.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="no pictures.*1 could not be used, and the" if broken else "no pictures"):
        read(tmp_path / "pictures", tmp_path)
    with pytest.raises(ValueError, match="There is no folder"):
        read(tmp_path / "gone", tmp_path)


def processes(folder, count, die_at=0):
    """Runs the job in `count` processes; their codes and what they said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [subprocess.Popen(
        [sys.executable, ranks.__file__, folder, str(die_at)], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "RANK": str(rank),
             "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    ) for rank in range(count)]
    return [(process.communicate(timeout=300)[1], process.returncode) for process in started]


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is not a thing there")
def test_two_processes_learn_what_one_does_also_when_one_is_killed(model, clip, tmp_path):
    (said, code), (_, killed) = processes(tmp_path, 2, die_at=3)
    assert killed == -signal.SIGKILL and code == 1
    assert "Another process of this job is gone" in said
    for said, code in processes(tmp_path, 2):
        assert code == 0 and re.findall(r"^step \d", said, re.MULTILINE) == ["step 4", "step 5"]
    assert (tmp_path / "disk0").is_dir() and not (tmp_path / "disk1").exists()
    save(learn(model, clip, tmp_path / "alone"), tmp_path, "alone")
    found, expected = (load(tmp_path / f"{name}.safetensors") for name in ("domain", "alone"))
    assert_same_learned(expected, found)


def test_it_goes_on_from_another_domain(model, clip, tmp_path):
    first = learn(model, clip, tmp_path)
    begun = pretrain(model, clip, SAMPLES, replace(RECIPE, steps=1, rate=1e-9, offset_rate=1e-9, weight_decay=0.0),
                     Keeping(tmp_path), METRIC, start=first)
    for name, tensor in first.encoder.state_dict().items():
        torch.testing.assert_close(begun.encoder.state_dict()[name], tensor)
    assert json.loads(begun.metadata["concepts.training"])["start"]["steps_done"] == 5
    with pytest.raises(ValueError, match="another shape"):
        pretrain(model, clip, SAMPLES, replace(RECIPE, levels=(8, 24)), Keeping(tmp_path), METRIC, start=first)


def subjects_of_their_own_colour(count=12):
    """Each subject is a patch of one colour, at another place of a noisy picture in each view."""
    generator = torch.Generator().manual_seed(3)
    pictures = torch.randint(256, (count, 3, 32, 32, 3), generator=generator, dtype=torch.uint8)
    colours = torch.randint(256, (count, 3), generator=generator, dtype=torch.uint8)
    for subject, colour in enumerate(colours):
        for view in range(3):
            top, left = torch.randint(16, (2,), generator=generator).tolist()
            pictures[subject, view, top:top + 16, left:left + 16] = colour
    return pictures


@torch.no_grad()
def recognised(encoder, pictures):
    """The share of subjects whose third view is nearest to their own second one."""
    one, two = (torch.nn.functional.normalize(said - said.mean(0), dim=1) for said in (
        encoder.image_part(pictures[:, view].float() / 255) for view in (1, 2)))
    return ((one @ two.T).argmax(1) == torch.arange(len(pictures))).float().mean()


def test_a_new_stem_learns_to_tell_subjects_apart():
    torch.manual_seed(0)
    encoder = Encoder(Shape((8, 16), 4, {"clip_l": 4}, {"layer": 4}, side=32))
    pictures = subjects_of_their_own_colour()
    samples = Samples(pictures, torch.zeros(12, 3, 4, 8, 8), torch.ones(12, 3, 1, 8, 8))
    others = [p.clone() for name, p in encoder.named_parameters() if not name.startswith(("stem", "levels"))]
    before = recognised(encoder, pictures)
    recognise(encoder, samples, 60, 0)
    assert recognised(encoder, pictures) >= 0.8 > before
    left = (p for name, p in encoder.named_parameters() if not name.startswith(("stem", "levels")))
    assert all(torch.equal(one, two) for one, two in zip(others, left, strict=True))


def test_what_a_stem_learned_first_is_not_learned_again(model, clip, tmp_path, monkeypatch):
    """The word's slash is no folder of the state's."""
    taught = []
    monkeypatch.setattr(concepts_pack.e4t.learner, "recognise", lambda *args: taught.append(args))
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Learner, "step", lambda *args: (_ for _ in ()).throw(Stop))
        learn(model, clip, tmp_path, word="cat/dog")
    assert len(taught) == 1 and len(list(tmp_path.glob("e4t-cat-dog-*.safetensors"))) == 1
    learn(model, clip, tmp_path, word="cat/dog", steps=1)
    assert len(taught) == 1


def test_a_stem_that_learns_hears_cancel():
    encoder = Encoder(Shape((8, 16), 4, {"clip_l": 4}, {"layer": 4}, side=32))
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(Cancelled):
        recognise(encoder, SAMPLES, 60, 0)


@pytest.mark.parametrize("part", [slice(0, 1), slice(0, 4)])
def test_single_subjects_and_single_views_teach_a_stem_nothing(part):
    pictures = SAMPLES.pictures[part] if part.stop == 1 else SAMPLES.pictures[part, :1]
    encoder = Encoder(Shape((8, 16), 4, {"clip_l": 4}, {"layer": 4}, side=32))
    before = encoder.levels[0].weight.clone()
    recognise(encoder, Samples(pictures, SAMPLES.latents, SAMPLES.weights), 3, 0)
    assert torch.equal(encoder.levels[0].weight, before)


def test_the_regulariser_holds_the_offsets_too(model, clip):
    with learner_of(model, clip) as learner, torch.no_grad():
        for offset in learner.offsets.values():
            offset.left.normal_(std=0.3)
        pair = draw_pair(SAMPLES, 1000, 2, 0, 0)
        said = learner.predictor.predict(pair.pictures, pair.latents, pair.noise, pair.timesteps)
        with_it, without = (learner.predictor.loss(pair, False, weight) for weight in (100.0, 0.0))
        size = said.words["clip_l"].square().mean(1) + penalty(learner.offsets)
    torch.testing.assert_close(with_it - without, 100 * size, rtol=1e-3, atol=1e-3)


def test_the_scale_is_that_of_words_and_their_size(model, clip):
    with learner_of(model, clip, scale=0.5) as learner, torch.no_grad():
        predictor, pair = learner.predictor, draw_pair(SAMPLES, 1000, 2, 0, 0)
        said = predictor.predict(pair.pictures, pair.latents, pair.noise, pair.timesteps)
        offset = predictor.words(said)["clip_l"][:, 0] - predictor.rows["clip_l"]
        torch.testing.assert_close(offset, 0.5 * predictor.units["clip_l"] * said.words["clip_l"], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(predictor.size(said), 0.25 * said.words["clip_l"].square().mean(1))


@pytest.mark.parametrize("edited", [False, True])
def test_masks_and_sentences_of_each_sample_count(model, clip, monkeypatch, edited):
    heard, encode_words = [], method_module.encode_words
    error = torch.rand(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(method_module, "denoising_error", lambda *given: error)
    monkeypatch.setattr(method_module, "encode_words",
                        lambda clip, texts, words: heard.extend(texts) or encode_words(clip, texts, words))
    with learner_of(model, clip) as learner, torch.no_grad():
        pair = replace(draw_pair(SAMPLES, 1000, 4, 0, 0), weights=torch.rand(4, 1, 8, 8))
        loss = learner.predictor.loss(pair, edited, 0.0)
    torch.testing.assert_close(loss, weighted_mean(error, pair.weights))
    assert heard == [fill(SENTENCES[lot % len(SENTENCES)], PLACEHOLDER) for lot in pair.lots] and len(set(heard)) == 4


def test_rates_rise_over_the_warmup_and_fall_along_a_half_cosine(model, clip):
    with learner_of(model, clip, warmup=3, rate=1e-3, offset_rate=2e-3, stem=0.1) as learner:
        for number, done, share in ((0, 0.0, 0.25), (2, 0.0, 0.75), (3, 0.0, 1.0), (9, 0.5, 0.5), (9, 1.0, 0.0)):
            learner.step([draw_pair(SAMPLES, 1000, 4, 0, number)], number, done, Workers(), bf16=False)
            rates = [group["lr"] for group in learner.optimiser.param_groups]
            assert rates == pytest.approx([share * peak for peak in (1e-4, 1e-3, 2e-3, 0.0)])


def test_large_gradients_are_cut(model, clip):
    with learner_of(model, clip) as learner:
        hooks = [parameter.register_hook(lambda gradient: 1e4 * gradient) for parameter in learner.trained]
        steps(learner, 1)
        norm = torch.cat([p.grad.flatten() for p in learner.trained if p.grad is not None]).norm()
        for hook in hooks:
            hook.remove()
    assert norm.item() == pytest.approx(1, rel=1e-3)


def test_another_pretraining_has_other_states(model, clip, tmp_path):
    start = pretrain(model, clip, SAMPLES, replace(RECIPE, steps=1), Keeping(tmp_path), METRIC)
    given = RECIPE, SAMPLES, "weights", None
    names = [_run(*given), *(_run(replace(RECIPE, **{name: value}), *given[1:]) for name, value in (
        ("rate", 0.5), ("regulariser", 0.5), ("seed", 9), ("batch_size", 2), ("edited", 0.1), ("offsets", False)))]
    names += [_run(RECIPE, replace(SAMPLES, source="other"), "weights", None), _run(RECIPE, SAMPLES, "others", None),
              _run(RECIPE, SAMPLES, "weights", start)]
    assert len(set(names)) == len(names)
    assert _run(replace(RECIPE, steps=99, minutes=9.0), *given[1:]) == names[0]


def test_held_out_subjects_are_not_learned_from(model, clip, tmp_path, monkeypatch):
    drawn, validated = [], []
    monkeypatch.setattr(concepts_pack.e4t.pretrain, "draw_pair",
                        lambda samples, *given: drawn.append(samples) or draw_pair(samples, *given))
    monkeypatch.setattr(concepts_pack.e4t.pretrain, "errors",
                        lambda predictor, encoder, offsets, held, times: validated.append(held))
    samples = ranks.samples(20)
    pretrain(model, clip, samples, replace(RECIPE, steps=1, recognition=0), Keeping(tmp_path), METRIC)
    assert all(torch.equal(each.latents, samples.latents[:18]) for each in drawn) and drawn
    assert torch.equal(validated[0].latents, samples.latents[18:])


def test_what_is_outside_a_mask_counts_little(tmp_path):
    folder = folder_of(tmp_path, "a.png", "b.png")
    mask = Image.new("L", (64, 48))
    mask.paste(255, (0, 0, 24, 48))
    mask.save(folder / "a.mask.png")
    weights = ranks.in_memory(read(folder, tmp_path, views=1)).weights[:, 0, 0].float()
    assert weights[0, :, :3].min() > 0.95 and weights[0, :, -3:].max() == pytest.approx(0.1, abs=1e-2)
    assert (weights[1] == 1).all()


def test_noisy_levels_come_more_often():
    even, moved = (draw_pair(SAMPLES, 1000, 4, 0, 3, times=times).batch.timesteps for times in (1.0, 0.5))
    assert torch.equal(moved, later(even, 1000, 0.5)) and not torch.equal(moved, even)


def test_errors_are_told_by_their_names(model, clip):
    with learner_of(model, clip) as learner, torch.no_grad():
        for offset in learner.offsets.values():
            offset.left.normal_(std=0.3)
        said = errors(learner.predictor, learner.encoder, learner.offsets, SAMPLES, 1.0)

        def mean(encoder, offsets, edited):
            with learner.predictor.acting(encoder, offsets):
                return torch.cat([learner.predictor.loss(draw_pair(SAMPLES, 1000, 16, 1, number), edited, 0.0)
                                  for number in range(8)]).mean().item()

        found = [mean(learner.encoder, learner.offsets, False), mean(learner.encoder, learner.offsets, True),
                 mean(Encoder(learner.encoder.shape), {}, False)]
    assert said == ("error {:.4f} by word and offsets, {:.4f} by word and values, {:.4f} by the class "
                    "word").format(*found)


def test_pictures_are_drawn_with_the_offsets(model, clip, calm_vae):
    look, drawn = Look(calm_vae, lambda *given: None, 3.0), []
    with private_copies(model, clip) as (unet, text):
        learner = Learner(unet, text, RECIPE, METRIC, SAMPLES, None)
        with learner.predictor.installed:
            for strength in (0.0, 0.5):
                offsets = {name: Offset(torch.full_like(o.left, strength), o.right.detach())
                           for name, o in learner.offsets.items()}
                drawn.append(pictures(learner.predictor, unet, text, look, learner.encoder, offsets, SAMPLES, 0))
    assert torch.equal(drawn[0][:64], drawn[1][:64]) and not torch.equal(drawn[0][64:], drawn[1][64:])


def test_each_setting_is_read_anew(tmp_path):
    folder = folder_of(tmp_path, "a.png", "b.png")
    given = [folder, 2, 64, 32, False, 0.1, 0, encode, "vae", tmp_path / "work"]
    sources = [read_samples(*given).source]
    for place, value in ((1, 3), (2, 128), (3, 48), (4, True), (5, 0.5), (6, 1), (8, "other")):
        sources.append(read_samples(*given[:place], value, *given[place + 1:]).source)
    assert len(set(sources)) == len(sources) == 8 and read_samples(*given).source == sources[0]


def test_options_reach_the_pretraining(model, clip, calm_vae, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(concepts_pack.e4t.pretrain, "precision", lambda clip: torch.eye(WIDTH))
    monkeypatch.setattr(concepts_pack.e4t.pretrain, "pretrain", lambda *given, **more: told(given, more))
    start = save(toy_domain(), tmp_path, "start")
    given = {"folder": folder_of(tmp_path, "a.png", "b.png"), "checkpoint": "toy", "word": "cat", "steps": 2,
             "batch-size": 2, "resolution": 64, "side": 32, "output": tmp_path / "made", "work": tmp_path / "work",
             "start": start, "accumulation": 2, "preview-cfg": 3.5, "rate": 0.5}
    with pytest.raises(Told) as heard:
        options = [part for name, value in given.items() for part in (f"--{name}", str(value))]
        run(parser().parse_args(["--no-offsets", "--fp32", *options]), (model, clip, calm_vae))
    positional, more = heard.value.args
    settings, bf16 = positional[3], positional[8]
    assert (settings.offsets, settings.rate, settings.steps, bf16) == (False, 0.5, 2, False)
    assert digest(more["start"]) == digest(toy_domain()) and more["accumulation"] == 2 and more["look"].cfg == 3.5


def test_a_domain_knows_the_text_encoder_it_was_learned_on(model, clip, tmp_path):
    made = pretrain(model, clip, SAMPLES, replace(RECIPE, steps=1, recognition=0), Keeping(tmp_path), METRIC)
    assert made.text == fingerprint_of(clip) and made.model


def test_what_is_kept_is_the_moving_average(model, clip):
    with learner_of(model, clip) as learner:
        steps(learner, 2)
        encoder, offsets = learner.averaged()
        found = [*encoder.parameters(), *(factor for o in offsets.values() for factor in (o.left, o.right))]
        assert all(map(torch.equal, found, learner.mean)) and not all(map(torch.equal, found, learner.trained))
