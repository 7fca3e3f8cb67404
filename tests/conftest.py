"""Puts the real ComfyUI on the path and loads the pack the way ComfyUI does, as `concepts_pack`."""

import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def script(name: str):
    """Import a script of this checkout by its path, as a module of its stem."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if "COMFYUI_PATH" not in os.environ:
    raise pytest.UsageError("These tests need a ComfyUI: run them with `python3 dev.py test`.")
launch = script("microworld/launch.py")
launch.use_host()
launch.load_pack()


def interrupt(*_):
    """Let SIGTERM end the tests as Ctrl-C does, once."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The URL of a real server with this pack, and its base folder; it runs until the last test."""
    dev = script("dev.py")
    before = signal.signal(signal.SIGTERM, interrupt)
    host, folder = dev.Host(Path(os.environ["COMFYUI_PATH"]), Path(sys.executable)), tmp_path_factory.mktemp("server")
    with dev.serve(host, folder) as url:
        yield url, folder
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def client(server):
    """A client of the real server."""
    from concepts_pack.microworld.client import Client

    return Client(server[0])


@pytest.fixture(scope="session")
def models(server):
    """The real server's models folder, with the kinds of model the tests put there."""
    for kind in ("embeddings", "loras"):
        (server[1] / "models" / kind).mkdir(parents=True, exist_ok=True)
    return server[1] / "models"


def outcome(client, prompt_id, seconds=300):
    """Wait for a prompt to end, and return what the server tells of it by kind of message."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        history = json.loads(client.get(f"/history/{prompt_id}"))
        if prompt_id in history:
            return dict(history[prompt_id]["status"]["messages"])
        time.sleep(0.1)
    raise TimeoutError(f"The prompt did not end within {seconds} s.")
