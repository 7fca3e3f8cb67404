"""Puts the real ComfyUI on the path and loads the pack the way ComfyUI does, as `concepts_pack`."""

import importlib.util
import os
from pathlib import Path

import pytest

_LAUNCH = Path(__file__).resolve().parents[1] / "microworld" / "launch.py"
_spec = importlib.util.spec_from_file_location("launch", _LAUNCH)
launch = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(launch)

if "COMFYUI_PATH" not in os.environ:
    raise pytest.UsageError("These tests need a ComfyUI: run them with `python3 dev.py test`.")
launch.use_host()
launch.load_pack()
