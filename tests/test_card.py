"""The example workflows on a graphics card, as far as one can be had anywhere: `card/card.cpp`."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from concepts_pack.microworld.client import Client

from .conftest import interrupt, script
from .test_server import ROOT, WORKFLOWS, example

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the card is compiled by g++")


@pytest.fixture(scope="module", params=["half precision", "single precision"])
def client(request, tmp_path_factory):
    """A client of a real server that finds the card."""
    dev, folder = script("dev.py"), tmp_path_factory.mktemp("card")
    host = dev.Host(Path(os.environ["COMFYUI_PATH"]), Path(sys.executable))
    before = signal.signal(signal.SIGTERM, interrupt)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT / "tests" / "card"))
        options = ["--force-fp32"] if request.param == "single precision" else []
        patch.setattr(dev, "server_command", lambda *given, command=dev.server_command: [*command(*given), *options])
        with dev.serve(host, folder) as url:
            assert "Device: npu" in (folder / "server.log").read_text(encoding="utf-8")
            yield Client(url)
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("name", [path.stem for path in WORKFLOWS])
def test_example_runs(client, name):
    prompt = example(client.object_info(), name)
    for node in prompt.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 2
    outputs = client.run(prompt)
    pictures = [client.images(outputs[key]) for key, node in prompt.items() if node["class_type"] == "SaveImage"]
    assert pictures and all(data.startswith(b"\x89PNG") for images in pictures for data in images)
