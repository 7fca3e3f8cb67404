"""Runs the Textual Inversion example in a running ComfyUI and lays the learned word beside the class word, then the
Perfusion example that draws one concept at several biases, and the E4T example that makes a concept of one picture.

`python3 dev.py demo` starts the server and calls this with the host's Python. The training node's inputs stay the same
from one submission to the next, so the server trains once and then only draws.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parent))  # isolated Pythons, such as Windows portable's, lack it
from client import Client, ComfyError, choose, to_prompt  # noqa: E402

WORKFLOW = Path(__file__).parents[1] / "example_workflows" / "textual_inversion.json"
SLIDER = WORKFLOW.with_name("perfusion_slider.json")
ONE_PICTURE = WORKFLOW.with_name("e4t_one_picture.json")
PHOTOS, TRAIN = "ConceptsMicroworldPhotos", "ConceptsTrainTextualInversion"
SCENES = (
    "a {} in the snow",
    "a {} in the desert",
    "a {} in front of a brick wall",
    "a {} in the grass",
    "a {} wearing a hat in the snow",
    "a {} on a blue car in the grass",
    "a {} left of a red house in the desert",
    "a {} left of a yellow tree in the snow",
)
PER_SCENE = 2

CELL, GAP, MARGIN = 160, 8, 32
PAPER, INK, FADED = "#faf9f6", "#20222a", "#6e7078"


def main() -> int:
    """Train, draw every scene with both words, and leave the pictures in the output folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="train for fewer steps than the workflow says")
    options = parser.parse_args()
    try:
        client = Client(options.server)
        sheet = demonstrate(client, options.out, options.steps)
        slider = slide(client, options.out)
        single = one_picture(client, options.out)
    except ComfyError as error:
        print(error)
        return 1
    except KeyboardInterrupt:
        return 130
    print(f"Contact sheet: {sheet}\nOne slider:    {slider}\nOne picture:   {single}\nAll pictures:  {options.out}")
    return 0


def demonstrate(client: Client, out: Path, steps: int | None) -> Path:
    """Teach the word, draw the scenes with the class word and the learned word, and return the contact sheet."""
    info = client.object_info()
    prompt = to_prompt(json.loads(WORKFLOW.read_text(encoding="utf-8")), info)
    trainer = prompt[find(prompt, TRAIN)]["inputs"]
    if steps:
        choose(trainer, info[TRAIN], "preset", "own settings", steps=steps)
    words = (trainer["init_text"], trainer["placeholder"])
    photos, training = teach(client, prompt, info, out)
    prompt[find(prompt, "EmptyLatentImage")]["inputs"]["batch_size"] = PER_SCENE
    rows = []
    for number, scene in enumerate(SCENES, 1):
        print(scene.format(words[1]), flush=True)
        stems = (f"scene-{number}-class-word", f"scene-{number}-learned-word")
        texts = [scene.format(word) for word in words]
        rows.append([draw(client, prompt, text, number, out / stem) for text, stem in zip(texts, stems, strict=True)])
    return contact_sheet(photos, training, rows, words, out / "contact_sheet.png")


def teach(client: Client, prompt: dict, info: dict, out: Path) -> tuple[list[Path], list[Path]]:
    """Run the workflow as it is, and keep the photos and the training sheet besides its own pictures."""
    taps = {"photo": tap(prompt, PHOTOS, info), "training": tap(prompt, TRAIN, info)}
    outputs = client.run({**prompt, **taps}, Progress())
    client.save_images(outputs[find(prompt, "SaveImage")], out, "workflow")
    return tuple(client.save_images(outputs[name], out, name) for name in taps)


def draw(client: Client, prompt: dict, text: str, seed: int, stem: Path) -> list[Path]:
    """Run the workflow with another text and seed, and return its pictures."""
    sampler = prompt[find(prompt, "KSampler")]["inputs"]
    sampler["seed"] = seed
    prompt[sampler["positive"][0]]["inputs"]["text"] = text
    outputs = client.run(prompt)
    return client.save_images(outputs[find(prompt, "SaveImage")], stem.parent, stem.name)


def slide(client: Client, out: Path) -> Path:
    """Run the Perfusion example, keep its pictures, and return a sheet with a column for each bias."""
    prompt = to_prompt(json.loads(SLIDER.read_text(encoding="utf-8")), client.object_info())
    print("one concept at several biases", flush=True)
    outputs = client.run(prompt, Progress())
    saving = {node["_meta"]["title"]: outputs[key] for key, node in prompt.items() if node["class_type"] == "SaveImage"}
    columns = {title: client.save_images(output, out, title.replace(" ", "-")) for title, output in saving.items()}
    rows = max(map(len, columns.values()))
    size = (2 * MARGIN + len(columns) * (CELL + GAP) - GAP, 2 * MARGIN + 36 + rows * (CELL + GAP) - GAP)
    sheet = Image.new("RGB", size, PAPER)
    for number, (title, pictures) in enumerate(columns.items()):
        left = MARGIN + number * (CELL + GAP)
        write(sheet, (left, MARGIN), title, 18, INK)
        for row, picture in enumerate(pictures):
            paste(sheet, picture, (left, MARGIN + 36 + row * (CELL + GAP)))
    sheet.save(out / "slider.png")
    return out / "slider.png"


def one_picture(client: Client, out: Path) -> Path:
    """Run the E4T example, keep its pictures, and return a sheet with the photo beside what its word draws."""
    info = client.object_info()
    prompt = to_prompt(json.loads(ONE_PICTURE.read_text(encoding="utf-8")), info)
    print("a concept from one picture", flush=True)
    outputs = client.run({**prompt, "photo": tap(prompt, PHOTOS, info)}, Progress())
    photos = client.save_images(outputs["photo"], out, "one-picture-photo")
    drawn = client.save_images(outputs[find(prompt, "SaveImage")], out, "one-picture")
    text = prompt[prompt[find(prompt, "KSampler")]["inputs"]["positive"][0]]["inputs"]["text"]
    columns = len(photos) + len(drawn)
    sheet = Image.new("RGB", (3 * MARGIN + columns * (CELL + GAP), 2 * MARGIN + 36 + CELL), PAPER)
    write(sheet, (MARGIN, MARGIN), "the picture", 18, INK)
    write(sheet, (2 * MARGIN + len(photos) * (CELL + GAP), MARGIN), text, 18, INK)
    for number, path in enumerate((*photos, *drawn)):
        gap = MARGIN if number >= len(photos) else 0
        paste(sheet, path, (MARGIN + gap + number * (CELL + GAP), MARGIN + 36))
    sheet.save(out / "one_picture.png")
    return out / "one_picture.png"


def find(prompt: dict, kind: str) -> str:
    """Return the id of the node of this type."""
    return next(key for key, node in prompt.items() if node["class_type"] == kind)


def tap(prompt: dict, kind: str, info: dict) -> dict:
    """Return a node that previews the image output of the node of this type."""
    source = [find(prompt, kind), info[kind]["output"].index("IMAGE")]
    return {"class_type": "PreviewImage", "inputs": {"images": source}}


class Progress:
    """Prints a node's progress in place on a terminal, and now and then elsewhere."""

    def __init__(self):
        self.printed = 0.0

    def __call__(self, title: str, value: int, maximum: int) -> None:
        done = value >= maximum
        if not done and time.monotonic() - self.printed < (0.2 if sys.stdout.isatty() else 10):
            return
        self.printed = time.monotonic()
        start, end = ("\r\x1b[K", "\n" if done else "") if sys.stdout.isatty() else ("", "\n")
        print(f"{start}{title}: {value} of {maximum}", end=end, flush=True)


def contact_sheet(photos: list[Path], training: list[Path], rows: list, words: tuple[str, str], path: Path) -> Path:
    """Lay out the photos, the training sheet and per scene what the class word and the learned word draw."""
    block = PER_SCENE * CELL + (PER_SCENE - 1) * GAP
    lefts = [MARGIN + column * (block + MARGIN) for column in range(3)]
    top, pitch = MARGIN + 64, CELL + 40
    sheet = Image.new("RGB", (lefts[2] + block + MARGIN, top + len(rows) * pitch + MARGIN - 12), PAPER)
    heads = (f"{len(photos)} photos", f"class word: {words[0]}", f"learned word: {words[1]}")
    for left, head in zip(lefts, heads, strict=True):
        write(sheet, (left, MARGIN), head, 26, INK)
    for number, photo in enumerate(photos):
        paste(sheet, photo, (lefts[0] + number % 2 * (CELL + GAP), top + number // 2 * (CELL + GAP)))
    paste_training(sheet, training, (lefts[0], top + (len(photos) + 1) // 2 * (CELL + GAP) + MARGIN), block)
    for number, (scene, row) in enumerate(zip(SCENES, rows, strict=True)):
        y = top + number * pitch
        for left, word, pictures in zip(lefts[1:], words, row, strict=True):
            write(sheet, (left, y + CELL + 6), scene.format(word), 18, FADED)
            for column, picture in enumerate(pictures):
                paste(sheet, picture, (left + column * (CELL + GAP), y))
    sheet.save(path)
    return path


def paste(sheet: Image.Image, path: Path, corner: tuple[int, int]) -> None:
    """Put a picture into one cell."""
    with Image.open(path) as picture:
        sheet.paste(picture.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS), corner)


def paste_training(sheet: Image.Image, training: list[Path], corner: tuple[int, int], width: int) -> None:
    """Put the training sheet below the photos, as large as fits."""
    write(sheet, corner, "training", 26, INK)
    with Image.open(training[0]) as picture:
        space = (width, sheet.height - corner[1] - 44 - MARGIN)
        sheet.paste(ImageOps.contain(picture.convert("RGB"), space), (corner[0], corner[1] + 44))


def write(sheet: Image.Image, corner: tuple[int, int], text: str, size: int, colour: str) -> None:
    """Write a line of text."""
    ImageDraw.Draw(sheet).text(corner, text, colour, ImageFont.load_default(size))


if __name__ == "__main__":
    sys.exit(main())
