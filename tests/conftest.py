"""Puts the real ComfyUI on the path and loads the pack the way ComfyUI does, as `concepts_pack`."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACK = "concepts_pack"


def use_host() -> None:
    """Make `comfy`, `nodes`, … importable, on the CPU where there is no GPU."""
    if "COMFYUI_PATH" not in os.environ:
        raise pytest.UsageError("These tests need a ComfyUI: run them with `python3 dev.py test`.")
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    import comfy.cli_args
    import torch

    comfy.cli_args.args.cpu = not torch.cuda.is_available()
    torch.set_num_threads(min(os.cpu_count() or 1, 4))


def load_pack():
    """Import this checkout as a package, which keeps its `nodes/` apart from ComfyUI's `nodes.py`."""
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACK] = module
    spec.loader.exec_module(module)
    return module


use_host()
load_pack()
