"""Learns the concepts inside the example workflows anew: `python3 dev.py run benchmarks/example_concepts.py`.

Each is the test concept of its class, by the first seed and the settings of `perfusion.py`, under the word it has.
"""

from __future__ import annotations

import json

import torch

from ..perfusion.inline import from_text, to_text
from .perfusion import learned
from .sampling import load_checkpoint
from .thumbnails import EXAMPLES


def main() -> None:
    torch.set_num_threads(1)
    base = load_checkpoint()
    for path in sorted(EXAMPLES.glob("*.json")):
        workflow = json.loads(path.read_text(encoding="utf-8"))
        holders = [node for node in workflow["nodes"] if node["type"] == "ConceptsInline"]
        for node in holders:
            (word,) = from_text(node["widgets_values"][0]).words
            concept = learned(base, f"test {word.class_word}", 0, "locked keys", word.placeholder)
            node["widgets_values"] = [to_text(concept)]
            print(f"{path.stem}: {word.placeholder}, a {word.class_word}", flush=True)
        if holders:
            path.write_text(json.dumps(workflow, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
