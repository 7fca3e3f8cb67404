"""Runs a script of this pack with ComfyUI around it: `python launch.py benchmarks/microworld.py --prompts 50`.

The pack is imported as ComfyUI imports it, under a name of its own, so that its `nodes/` never hides ComfyUI's
`nodes.py` and relative imports work. COMFYUI_PATH says where ComfyUI is.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACK = "concepts_pack"


def use_host() -> None:
    """Make `comfy`, `nodes`, … importable, on the CPU where there is no card. Raises KeyError without COMFYUI_PATH.

    Each process of a job gets the card of its number on its machine, before the host looks for one, and its share of
    the processors, whose threads otherwise wait for each other most of the time.
    """
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    import comfy.cli_args
    import torch

    cards = any(kind.is_available() for kind in (torch.cuda, torch.xpu, torch.backends.mps))
    comfy.cli_args.args.cpu = not cards and importlib.util.find_spec("torch_npu") is None
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.set_num_threads(max(1, min((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 4)))


def load_pack():
    """Import this checkout as the package `concepts_pack`."""
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACK] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    script = Path(sys.argv[1]).resolve().relative_to(ROOT).with_suffix("")
    here = str(Path(__file__).resolve().parent)  # which isolated Pythons, such as Windows portable's, leave out
    sys.path[:] = [path for path in sys.path if path != here]
    arguments, sys.argv = sys.argv[2:], sys.argv[:1]
    use_host()
    load_pack()
    sys.argv += arguments
    runpy.run_module(".".join((PACK, *script.parts)), run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
