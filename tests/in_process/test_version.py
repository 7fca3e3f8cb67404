"""A ComfyUI that is too old is told so, not that some argument is unexpected."""

import asyncio
from pathlib import Path

import comfyui_version
import concepts_pack
import pytest
from concepts_pack.host.version import OLDEST, check_version

ROOT = Path(concepts_pack.__file__).parent


@pytest.mark.parametrize("version", ["0.3.64", "0.18.1", "0.9"])
def test_an_older_host_is_one_sentence(monkeypatch, version):
    monkeypatch.setattr(comfyui_version, "__version__", version)
    with pytest.raises(RuntimeError, match=f"This is ComfyUI {version}, .* needs 0.18.2 or newer: update ComfyUI."):
        asyncio.run(concepts_pack.comfy_entrypoint())


@pytest.mark.parametrize("version", ["0.18.2", "0.20", "0.100.0", "1.0.0", "0.30.0+local.3", "nightly"])
def test_others_are_not_held_up(monkeypatch, version):
    monkeypatch.setattr(comfyui_version, "__version__", version)
    check_version()


def test_the_registry_is_told_the_same():
    assert f'requires-comfyui = ">={OLDEST}"' in (ROOT / "pyproject.toml").read_text()
