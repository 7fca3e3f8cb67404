"""Many trainings in one process leave nothing behind."""

import gc

import comfy.model_management
import folder_paths
import pytest
import torch
from concepts_pack.host.progress import Cancelled
from concepts_pack.textual_inversion.train import Keeping, Preview, Recipe, learn_word
from concepts_pack.training.dataset import gather
from concepts_pack.training.loop import Diverged

QUIET = Preview(every=0, steps=1)


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))


def held():
    """How many tensors are alive, their bytes, and how many models the host has down as loaded."""
    gc.collect()
    alive = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    dense = [tensor for tensor in alive if tensor.layout == torch.strided]
    return len(alive), sum(tensor.nbytes for tensor in dense), len(comfy.model_management.current_loaded_models)


def grown(train, first, last):
    """What is held after training `last` times beyond what was held after `first` times."""
    for _ in range(first):
        train()
    before = held()
    for _ in range(last - first):
        train()
    return [now - then for now, then in zip(held(), before, strict=True)]


def train_once(model, clip, vae, photos, **changes):
    settings = {"steps": 1, "learning_rate": 0.01, "batch_size": 1, "seed": 5, **changes}
    learn_word(model, clip, vae, gather([photos]), Recipe("<mine>", "cat", **settings), QUIET, Keeping(every=1))


def test_twenty_trainings_hold_what_five_held(model, clip, vae, photos):
    assert max(grown(lambda: train_once(model, clip, vae, photos), 5, 20)) <= 0


def test_trainings_that_fail_hold_nothing_either(model, clip, vae, photos):
    def fail():
        comfy.model_management.interrupt_current_processing(True)
        with pytest.raises(Cancelled):
            train_once(model, clip, vae, photos)
        with pytest.raises(Diverged):
            train_once(model, clip, vae, photos, steps=3, learning_rate=1e30)

    assert max(grown(fail, 2, 4)) <= 0
