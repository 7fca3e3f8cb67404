"""Runs example workflows as they are in a real server and makes their thumbnails out of what they save.

`python3 dev.py run benchmarks/thumbnails.py` makes all anew; `perfusion_slider perfusion_inline` behind it only these.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
import tempfile
from pathlib import Path

from PIL import Image

from ..dev import Host, serve
from ..microworld.client import Client, to_prompt

EXAMPLES = Path(__file__).parents[1] / "example_workflows"
CELL = 160
LARGEST = 60_000  # bytes


def pictures_of(client: Client, path: Path) -> list[list[Image.Image]]:
    """What each Save Image node of a workflow saves, in the workflow's order."""
    prompt = to_prompt(json.loads(path.read_text(encoding="utf-8")), client.object_info())
    outputs = client.run(prompt)
    saving = [key for key, node in prompt.items() if node["class_type"] == "SaveImage"]
    return [[Image.open(io.BytesIO(data)).convert("RGB") for data in client.images(outputs[key])] for key in saving]


def grid(saved: list[list[Image.Image]]) -> Image.Image:
    """A row for each node that saves; the pictures of a single one nearly as a square."""
    pictures = [picture for row in saved for picture in row]
    columns = len(saved[0]) if len(saved) > 1 else math.ceil(math.sqrt(len(pictures)))
    sheet = Image.new("RGB", (columns * CELL, -(-len(pictures) // columns) * CELL), "white")
    for place, picture in enumerate(pictures):
        row, column = divmod(place, columns)
        sheet.paste(picture.resize((CELL, CELL), Image.Resampling.LANCZOS), (column * CELL, row * CELL))
    return sheet


def as_jpeg(sheet: Image.Image) -> bytes:
    """The best quality that is small enough. Raises StopIteration if none is."""
    def packed(quality: int) -> bytes:
        file = io.BytesIO()
        sheet.save(file, "JPEG", quality=quality, optimize=True)
        return file.getvalue()

    return next(data for data in map(packed, range(92, 20, -8)) if len(data) <= LARGEST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=sorted(path.stem for path in EXAMPLES.glob("*.json")))
    names = parser.parse_args().names
    host = Host(Path(os.environ["COMFYUI_PATH"]), Path(sys.executable))
    with (
        tempfile.TemporaryDirectory(prefix="concepts-", ignore_cleanup_errors=True) as folder,
        serve(host, Path(folder)) as url,
    ):
        for name in names:
            data = as_jpeg(grid(pictures_of(Client(url), EXAMPLES / f"{name}.json")))
            (EXAMPLES / f"{name}.jpg").write_bytes(data)
            print(f"{name}.jpg: {len(data) / 1000:.0f} KB", flush=True)


if __name__ == "__main__":
    main()
