"""A training that was stopped in any way goes on as if it never had been."""

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from concepts_pack.host.pictures import to_latents
from concepts_pack.host.progress import Cancelled
from concepts_pack.textual_inversion import train
from concepts_pack.textual_inversion.file import to_bytes
from concepts_pack.textual_inversion.train import Keeping, Preview, Recipe, Watcher, learn_word
from concepts_pack.training.dataset import gather
from concepts_pack.training.optimisers import OPTIMISERS
from concepts_pack.training.states import States

from .test_covariance import with_lora

HERE = Path(__file__).parent
QUIET = Preview(every=0, steps=1)
KEEPING = Keeping(every=2, keep=2)


def recipe(**changes):
    return Recipe(**{"placeholder": "<mine>", "init_text": "cat", "steps": 7, "learning_rate": 0.01, "batch_size": 2,
                     "seed": 5, "accumulation": 2, **changes})


@pytest.fixture(autouse=True)
def states(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    yield tmp_path / "concepts" / "states"
    comfy.utils.set_progress_bar_global_hook(None)
    comfy.model_management.interrupt_current_processing(False)


def cancel_at(step):
    def hear(value, total, *_, **__):
        if total == 7 and value == step:
            comfy.model_management.interrupt_current_processing(True)
    comfy.utils.set_progress_bar_global_hook(hear)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_cancelled_and_queued_again_equals_never_stopped(model, clip, vae, photos, states, optimiser):
    settings = recipe(optimiser=optimiser)
    whole = learn_word(model, clip, vae, gather([photos]), settings, QUIET)
    cancel_at(3)
    part = learn_word(model, clip, vae, gather([photos]), settings, QUIET, KEEPING)
    assert 3 <= len(part.losses) < 7 and len(list(states.iterdir())) > 0
    comfy.utils.set_progress_bar_global_hook(None)
    rest = learn_word(model, clip, vae, gather([photos]), settings, QUIET, KEEPING)
    assert rest.losses == whole.losses and to_bytes(rest.concept) == to_bytes(whole.concept)
    assert not list(states.iterdir())


def test_other_settings_photos_or_weights_do_not_resume(model, clip, vae, photos, velocity_model):
    cancel_at(3)
    learn_word(model, clip, vae, gather([photos]), recipe(), QUIET, KEEPING)
    comfy.utils.set_progress_bar_global_hook(None)
    velocity = ModelSamplingDiscrete().patch(model, "v_prediction", False)[0]
    for other in ((model, photos, recipe(seed=6)), (model, photos.flip(0), recipe()), (model, photos, recipe(steps=6)),
                  (velocity, photos, recipe())):
        base, pictures, settings = other
        fresh = learn_word(base, clip, vae, gather([pictures]), settings, QUIET)
        again = learn_word(base, clip, vae, gather([pictures]), settings, QUIET, KEEPING)
        assert fresh.losses == again.losses
    lora = model.clone()
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    lora.add_patches({key: (torch.ones(lora.model.get_parameter(key).shape),)})
    fresh = learn_word(lora, clip, vae, gather([photos]), recipe(), QUIET)
    assert learn_word(lora, clip, vae, gather([photos]), recipe(), QUIET, KEEPING).losses == fresh.losses


def test_another_vae_mask_or_caption_does_not_resume(model, clip, vae, photos, states):
    cancel_at(3)
    learn_word(model, clip, vae, gather([photos]), recipe(), QUIET, KEEPING)
    comfy.utils.set_progress_bar_global_hook(None)
    kept, other = sorted(states.iterdir()), copy.copy(vae)
    other.first_stage_model = copy.deepcopy(vae.first_stage_model)
    other.patcher = ModelPatcher(other.first_stage_model, vae.patcher.load_device, vae.patcher.offload_device)
    with torch.no_grad():
        next(other.first_stage_model.parameters()).mul_(1.01)
    masks = torch.zeros(len(photos), *photos.shape[1:3])
    masks[:, 40:90, 40:90] = 1
    for encoder, material in ((other, gather([photos])), (vae, gather([photos], [masks])),
                              (vae, gather([photos], captions=["a cat on a table"] * len(photos)))):
        learn_word(model, clip, encoder, material, recipe(), QUIET, KEEPING)
        assert sorted(states.iterdir()) == kept


def test_photos_that_are_encoded_a_little_differently_resume(model, clip, vae, photos, states, monkeypatch):
    """As on cards, where sums may come out otherwise the next time."""
    cancel_at(3)
    learn_word(model, clip, vae, gather([photos]), recipe(), QUIET, KEEPING)
    comfy.utils.set_progress_bar_global_hook(None)
    monkeypatch.setattr(train, "to_latents", lambda *args: to_latents(*args) * (1 + 1e-6))
    learn_word(model, clip, vae, gather([photos]), recipe(), QUIET, KEEPING)
    assert not list(states.iterdir())


def test_another_clip_skip_does_not_resume(model, clip, vae, photos, states):
    cancel_at(3)
    learn_word(model, clip, vae, gather([photos]), recipe(), QUIET, KEEPING)
    comfy.utils.set_progress_bar_global_hook(None)
    skipped, kept = clip.clone(), sorted(states.iterdir())
    skipped.clip_layer(-2)
    fresh, again = (learn_word(model, skipped, vae, gather([photos]), recipe(), QUIET, keeping)
                    for keeping in (None, KEEPING))
    assert to_bytes(again.concept) == to_bytes(fresh.concept) and sorted(states.iterdir()) == kept


def test_resume_can_be_turned_off(model, clip, vae, photos, states):
    cancel_at(3)
    part = learn_word(model, clip, vae, gather([photos]), recipe(), QUIET, KEEPING)
    kept = {path.name for path in states.iterdir()}
    cancel_at(1)
    anew = learn_word(model, clip, vae, gather([photos]), recipe(), QUIET, Keeping(every=2, resume=False))
    assert len(anew.losses) < len(part.losses) and {path.name for path in states.iterdir()} != kept


def test_only_the_newest_states_stay(tmp_path):
    states, weight = States(tmp_path, "run", every=1, keep=2), torch.nn.Parameter(torch.zeros(3))
    optimiser = torch.optim.AdamW([weight])
    for step in range(1, 12):
        weight.grad = torch.ones(3)
        optimiser.step()
        states.save([0.5] * step, optimiser)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["run-step0000010.safetensors", "run-step0000011.safetensors"]
    (tmp_path / names[1]).write_bytes((tmp_path / names[1]).read_bytes()[:-5])
    (tmp_path / "run-other-step0000099.safetensors").write_bytes(b"")
    assert len(states.restore(torch.optim.AdamW([weight]))) == 10


def test_a_state_of_another_shape_is_passed_over(tmp_path):
    states = States(tmp_path, "run", every=1)
    states.save([1.0], torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))]))
    weight = torch.nn.Parameter(torch.ones(2))
    assert states.restore(torch.optim.AdamW([weight])) == [] and weight.tolist() == [1, 1]


def test_cancelled_in_its_last_sample_a_training_leaves_no_states(model, clip, vae, photos, states, monkeypatch):
    """It is done all the same."""

    def cancelled(watcher, label):
        if label == "step 4":
            raise Cancelled
        sample(watcher, label)

    sample = Watcher.sample
    monkeypatch.setattr(Watcher, "sample", cancelled)
    lesson = learn_word(model, clip, vae, gather([photos]), recipe(steps=4), QUIET, Keeping(every=1))
    assert len(lesson.losses) == 4 and not list(states.glob("*.safetensors"))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells which files are mapped")
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_nothing_holds_on_to_a_state_that_was_resumed_from(tmp_path, optimiser):
    """Windows refuses to delete a file while a tensor is mapped from it."""
    states, weight = States(tmp_path, "run", every=1), torch.nn.Parameter(torch.zeros(3000))
    stepped, resumed = (OPTIMISERS[optimiser]([{"params": [weight], "lr": 0.1}]) for _ in range(2))
    weight.grad = torch.ones(3000)
    stepped.step()
    states.save([1.0], stepped)
    assert states.restore(resumed) == [1.0]
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_state_that_cannot_be_removed_is_left_over(tmp_path, caplog):
    (tmp_path / "run-step0000001.safetensors").mkdir()  # nothing that could be unlinked
    States(tmp_path, "run", every=1).clear()
    assert "left over" in caplog.text


def test_a_full_disk_costs_only_the_state(model, clip, vae, photos, states):
    states.parent.mkdir(parents=True)
    states.write_text("")  # a file where the folder should be
    lesson = learn_word(model, clip, vae, gather([photos]), recipe(), QUIET, KEEPING)
    assert len(lesson.losses) == 7


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is not a thing there")
def test_killed_without_warning_and_started_again(states, tmp_path):
    """Another process is killed in its fifth step; a third one ends with the file of an undisturbed fourth."""
    def process(output, die_at):
        command = [sys.executable, HERE / "killed.py", output, str(die_at)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    first = process(tmp_path / "a", 5)
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert len(list((tmp_path / "a" / "concepts" / "states").iterdir())) == 2
    second, undisturbed = process(tmp_path / "a", 0), process(tmp_path / "b", 0)
    assert second.stdout.split()[0] == "3", second.stderr  # the steps it still had to do
    assert undisturbed.stdout.split()[0] == "7"
    assert second.stdout.split()[1:] == undisturbed.stdout.split()[1:]


def test_a_lora_on_the_text_encoder_does_not_resume(model, clip, vae, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    states = tmp_path / "concepts" / "states"
    cancel_at(3)
    learn_word(model, clip, vae, gather([photos]), recipe(), QUIET, KEEPING)
    comfy.utils.set_progress_bar_global_hook(None)
    comfy.model_management.interrupt_current_processing(False)
    kept = sorted(states.iterdir())
    learn_word(model, with_lora(clip), vae, gather([photos]), recipe(), QUIET, KEEPING)
    assert sorted(states.iterdir()) == kept != []


def test_cancel_keeps_the_last_step(model, clip, vae, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    cancel_at(3)
    part = learn_word(model, clip, vae, gather([photos]), recipe(), QUIET, Keeping(every=100))
    comfy.utils.set_progress_bar_global_hook(None)
    comfy.model_management.interrupt_current_processing(False)
    (state,) = (tmp_path / "concepts" / "states").iterdir()
    assert state.stem.endswith(f"-step{len(part.losses):07d}")
