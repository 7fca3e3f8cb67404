"""Imports go one way, pure files know nothing of ComfyUI, and importing the pack is quick."""

import ast
import asyncio
import importlib.util
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ("host", "training", "textual_inversion", "perfusion", "e4t", "nodes")
PURE = [
    "training/contents.py", "training/disk.py", "training/names.py", "training/draws.py", "training/dataset.py",
    "training/folder.py", "training/optimisers.py", "training/preview.py", "training/states.py",
    "textual_inversion/concept.py", "textual_inversion/word.py", "textual_inversion/templates.py",
    "textual_inversion/file.py", "textual_inversion/formats.py", "perfusion/edit.py",
    "perfusion/concept.py", "perfusion/corpus.py",
    "e4t/release.py", "e4t/offsets.py", "e4t/encoder.py", "e4t/imported.py", "e4t/import_release.py",
    "e4t/difference.py", "e4t/domain.py", "e4t/difference_file.py", "e4t/samples.py", "e4t/shards.py",
    "e4t/workers.py",
]
HOST = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "execution", "folder_paths", "nodes", "server"}
FILES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


def imports(path):
    """(level, module) of every import statement, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    layer = path.relative_to(ROOT).parts[0]
    below = LAYERS[:LAYERS.index(layer)] + (("microworld",) if layer == "nodes" else ())
    allowed = {"host": HOST, "nodes": {"comfy_api"}}.get(layer, set())
    for level, module in imports(path):
        top = module.split(".")[0]
        assert level != 0 or top not in HOST - allowed, module
        assert level != 2 or top in below, module
        assert top not in LAYERS or level > 0, module


@pytest.mark.parametrize("name", PURE)
def test_pure_files_do_not_reach_the_host(name):
    for level, module in imports(ROOT / name):
        inside = {1: f"{name.split('/')[0]}/{module}", 2: module.replace(".", "/")}
        assert level == 0 or f"{inside[level]}.py" in PURE


def test_importing_costs_little():
    """Processor time of the import and of asking for the nodes, beside what ComfyUI has loaded itself."""
    costs = []
    for attempt in range(3):
        name = f"concepts_timed_{attempt}"
        spec = importlib.util.spec_from_file_location(
            name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        start = time.process_time()
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        asyncio.run(asyncio.run(module.comfy_entrypoint()).get_node_list())
        costs.append(time.process_time() - start)
    assert min(costs) < 1
