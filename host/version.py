"""The oldest ComfyUI that the pack works with."""

import re

import comfyui_version

OLDEST = "0.18.2"  # as pyproject.toml tells the registry


def check_version() -> None:
    """Raises RuntimeError with what to do about it in a ComfyUI that is too old."""
    own = _numbers(comfyui_version.__version__)
    if own and own < _numbers(OLDEST):
        raise RuntimeError(f"This is ComfyUI {comfyui_version.__version__}, and ComfyUI-Concepts needs {OLDEST} or "
                           "newer: update ComfyUI.")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
