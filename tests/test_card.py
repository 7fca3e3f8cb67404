"""The example workflows on a graphics card, as far as one can be had anywhere: `card/card.cpp`."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from concepts_pack.microworld.client import Client
from concepts_pack.microworld.domain import write_instance

from .conftest import interrupt, script
from .test_server import ROOT, WORKFLOWS, example, quickly, the

pytestmark = pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None,
                                reason="the card is compiled by g++ for Linux")


def card(tmp_path_factory, server, *options, **environment):
    """A client of a real server that finds the card; what the pack measured in the other server is known here too."""
    dev, folder = script("dev.py"), tmp_path_factory.mktemp("card")
    host = dev.Host(Path(os.environ["COMFYUI_PATH"]), Path(sys.executable))
    known = server[1] / "user" / "concepts"
    for needed in (folder / "user", known):
        needed.mkdir(parents=True, exist_ok=True)
    for number in range(2):
        write_instance(folder / "input" / "things", "car", number, 1)
    (folder / "user" / "concepts").symlink_to(known)
    before = signal.signal(signal.SIGTERM, interrupt)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT / "tests" / "card"))
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(dev, "server_command", lambda *given, command=dev.server_command: [*command(*given), *options])
        with dev.serve(host, folder) as url:
            assert "Device: npu" in (folder / "server.log").read_text(encoding="utf-8")
            yield Client(url)
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def single(tmp_path_factory, server):
    """In single precision, with which the text encoder stays on the processor."""
    yield from card(tmp_path_factory, server, "--force-fp32")


@pytest.fixture(scope="module")
def half(tmp_path_factory, server):
    """In half precision, with everything on the card."""
    yield from card(tmp_path_factory, server)


@pytest.fixture(scope="module")
def small(tmp_path_factory, server):
    """In half precision on a card that hardly holds the weights."""
    yield from card(tmp_path_factory, server, CONCEPTS_CARD_BYTES="36000000")


def drawn(client, prompt):
    """What the prompt saves, with two steps wherever something is drawn."""
    outputs = client.run(quickly(prompt))
    return [image for key, node in prompt.items() if node["class_type"] == "SaveImage"
            for image in client.images(outputs[key])]


@pytest.mark.parametrize("name", [path.stem for path in WORKFLOWS if path.stem != "e4t_pretrain"])
def test_example_runs(single, name):
    pictures = drawn(single, example(single.object_info(), name))
    assert pictures and all(data.startswith(b"\x89PNG") for data in pictures)


@pytest.mark.parametrize("kind", ["half", "small"])
def test_half_precision_trains(request, kind):
    client = request.getfixturevalue(kind)
    assert drawn(client, example(client.object_info(), "perfusion_train"))


def test_a_domain_is_pretrained_and_a_model_tuned(small):
    prompt = example(small.object_info(), "e4t_pretrain")
    the(prompt, "ConceptsPretrainE4T")["folder"] = "things"  # two instead of a hundred
    the(prompt, "ConceptsTuneE4T")["result"] = "tuned model"
    assert drawn(small, prompt)


@pytest.mark.parametrize("precision", ["single", "half"])
def test_a_model_is_tuned_where_it_finds_the_thing(request, precision):
    client = request.getfixturevalue(precision)
    prompt = example(client.object_info(), "e4t_one_picture")
    del the(prompt, "ConceptsTuneE4T")["masks"]
    the(prompt, "ConceptsTuneE4T")["result"] = "tuned model"
    assert drawn(client, prompt)


@pytest.mark.parametrize("precision", ["single", "half"])
def test_a_concept_is_inspected_exported_hooked_and_locked(request, precision):
    client = request.getfixturevalue(precision)
    prompt = example(client.object_info(), "perfusion_inline")
    given = {name: the(prompt, "ConceptsApply")[name] for name in ("model", "clip", "concept")}
    text = dict(the(prompt, "CLIPTextEncode"))
    prompt |= {
        "locked": {"class_type": "ConceptsEncodeGlobalKeys", "inputs": text},
        "hook": {"class_type": "ConceptsHook", "inputs": {**given, "strength": 1.0, "bias": 0.8}},
        "hooked": {"class_type": "CLIPTextEncode", "inputs": {**text, "clip": ["hook", 1]}},
        "set": {"class_type": "PairConditioningSetProperties", "inputs": {
            "positive_NEW": ["hooked", 0], "negative_NEW": ["locked", 0], "strength": 1.0, "set_cond_area": "default",
            "hooks": ["hook", 0]}},
        "inspect": {"class_type": "ConceptsInspect", "inputs": {"concept": given["concept"], "clip": given["clip"]}},
        "export": {"class_type": "ConceptsExportLora", "inputs": {
            **given, "name": "card", "strength": 1.0, "overwrite": True}},
    }
    the(prompt, "KSampler").update(model=given["model"], positive=["set", 0], negative=["set", 1])
    assert drawn(client, prompt)
