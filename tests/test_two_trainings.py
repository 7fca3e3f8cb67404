"""Trainings that several people queue at once on one real server."""

import copy
import json
from itertools import pairwise
from pathlib import Path

import pytest
from concepts_pack.microworld.client import Client, choose, to_prompt

from .conftest import outcome

WORKFLOW = Path(__file__).resolve().parents[1] / "example_workflows" / "textual_inversion.json"
TRAIN, SAVE = "ConceptsTrainTextualInversion", "ConceptsSave"
NEEDED = ("CheckpointLoaderSimple", "ConceptsMicroworldPhotos", TRAIN, SAVE)


@pytest.fixture(scope="module")
def example(client):
    """The example workflow up to the saved word, with a training of two steps."""
    info = client.object_info()
    prompt = to_prompt(json.loads(WORKFLOW.read_text(encoding="utf-8")), info)
    prompt = {key: node for key, node in prompt.items() if node["class_type"] in NEEDED}
    choose(the(prompt, TRAIN), info[TRAIN], "preset", "own settings", steps=2, batch_size=1)
    the(prompt, TRAIN).update(preview_steps=1, resolution=64)
    return prompt


def the(prompt, kind):
    """Return the inputs of the node of this type."""
    return next(node["inputs"] for node in prompt.values() if node["class_type"] == kind)


def queue(client, example, name, **changes):
    """Queue a training whose word is saved as `name`, and return at once with the id of the prompt."""
    prompt = copy.deepcopy(example)
    the(prompt, TRAIN).update(changes)
    the(prompt, SAVE)["name"] = name
    return json.loads(client.post("/prompt", {"prompt": prompt, "client_id": client.id}))["prompt_id"]


def test_trainings_queued_at_once_run_one_after_the_other(server, example):
    """The third is the first again, and is learned anew: the server only keeps what the last prompt made."""
    anna, ben = Client(server[0]), Client(server[0])
    ids = [queue(anna, example, "first", placeholder="<first>", seed=1),
           queue(ben, example, "other", placeholder="<other>", seed=2),
           queue(anna, example, "again", placeholder="<first>", seed=1)]
    waiting = [item[1] for item in json.loads(ben.get("/queue"))["queue_pending"]]
    assert ids[1] in waiting
    told = [outcome(anna, prompt_id) for prompt_id in ids]
    for before, after in pairwise(told):
        assert before["execution_success"]["timestamp"] <= after["execution_start"]["timestamp"]
    trainer = next(key for key, node in example.items() if node["class_type"] == TRAIN)
    assert not any(trainer in messages["execution_cached"]["nodes"] for messages in told)
    first, other, again = ((server[1] / "models" / "embeddings" / f"{name}.safetensors").read_bytes()
                           for name in ("first", "other", "again"))
    assert b'"concepts.placeholder":"<first>"' in first and b'"concepts.placeholder":"<other>"' in other
    assert first == again
