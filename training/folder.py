"""A folder of photos on disk, with masks and captions beside them."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from math import gcd
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

from .dataset import SMALLEST, Photo, telling

ENDINGS = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif")
READ = (*ENDINGS, ".txt")
MASK_ENDINGS = (".mask.png", "-mask.png", "_mask.png")
REPEATS = re.compile(r"(\d{1,3})_.*")  # 2024_summer is no number of repeats
LARGEST = 2048  # pixels of the short side, the most that a training square can have
ALL = re.compile(r"[^.].*")


def read_folder(folder: Path) -> list[Photo]:
    """The photos of a folder and of its `10_name` subfolders, those ten times as often, in the order of their names.

    A photo's caption is the .txt of its name; its mask is name.mask.png, white on the subject, else its alpha channel.
    Raises ValueError that names the folder or file that cannot be used.
    """
    read = cache(lambda path: replace(read_photo(path), caption=_caption(path)))
    photos = [read(path) for path in pictures_in(folder)]
    if not photos:
        raise ValueError(f"There are no pictures in {folder.name} (of {', '.join(e[1:] for e in ENDINGS)}).")
    return photos


def fingerprint(folder: Path, subfolders: re.Pattern[str] = REPEATS, endings: tuple[str, ...] = READ) -> str:
    """A digest that changes when any file of these endings does in the folder or its `subfolders`, by default pictures,
    masks and captions in those that `read_folder` reads."""
    digest = hashlib.sha256()
    folders = [folder, *(path for path in folder.iterdir() if path.is_dir() and subfolders.fullmatch(path.name))]
    for path in sorted(path for own in folders for path in own.iterdir()):
        if path.suffix.lower() in endings and not path.name.startswith("."):
            status = path.stat() if path.exists() else path.lstat()  # a link whose target is gone
            digest.update(f"{path.relative_to(folder)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def pictures_in(folder: Path) -> Iterator[Path]:
    """The pictures of a folder without the masks among them, and those of its `10_name` subfolders ten times as often.

    Each comes no more often than their ratio takes: how long to train is not the folder's to say.
    """
    counted: list[tuple[Path, int]] = []
    for path in sorted(folder.iterdir()):
        repeats = REPEATS.fullmatch(path.name)
        if path.is_dir() and repeats:
            counted += [(inner, int(repeats[1])) for inner in own_pictures(path)]
        elif _is_picture(path):
            counted.append((path, 1))
    shared = gcd(*(times for _, times in counted)) or 1
    for path, times in counted:
        yield from [path] * (times // shared)


def own_pictures(folder: Path) -> Iterator[Path]:
    """The pictures of a folder without the masks among them."""
    yield from filter(_is_picture, sorted(folder.iterdir()))


def _is_picture(path: Path) -> bool:
    hidden = path.name.startswith(".")  # such as macOS leaves beside pictures on other systems' disks
    return path.suffix.lower() in ENDINGS and not _is_mask(path) and not hidden


def _is_mask(path: Path) -> bool:
    """Whether a file is the mask of a picture beside it; venetian_mask.png alone is a photo of one."""
    return any(_beside(path.with_name(path.name[:-len(ending)] + ".png"), ENDINGS)
               for ending in MASK_ENDINGS if path.name.lower().endswith(ending))


def read_photo(path: Path) -> Photo:
    """A picture with the mask beside it, no larger than a training can use. Raises ValueError that names the file it
    cannot use."""
    picture, mask = _pixels(path)
    if min(picture.shape[:2]) < SMALLEST:
        raise ValueError(f"{path.name} is {picture.shape[1]}×{picture.shape[0]} pixels; at least {SMALLEST} a side are "
                         "needed.")
    beside = _beside(path, MASK_ENDINGS)
    if beside is not None:
        mask = _pixels(beside)[0].mean(-1)
        if mask.shape != picture.shape[:2]:
            raise ValueError(f"{beside.name} is {mask.shape[1]}×{mask.shape[0]} pixels, {path.name} "
                             f"{picture.shape[1]}×{picture.shape[0]}; they must be of one size.")
    return Photo(_fitted(picture), None if mask is None else telling(_fitted(mask[..., None])[..., 0]))


def _fitted(pixels: Tensor) -> Tensor:
    """Pixels (h w c) in 0..1 with a short side of at most `LARGEST`: twenty photos of a camera would fill memory."""
    factor = LARGEST / min(pixels.shape[:2])
    if factor >= 1:
        return pixels
    size = [round(factor * length) for length in pixels.shape[:2]]
    shrunk = interpolate(pixels.permute(2, 0, 1)[None], size=size, mode="bicubic", antialias=True).clamp(0, 1)
    return shrunk[0].permute(1, 2, 0).contiguous()


def _beside(path: Path, endings: tuple[str, ...]) -> Path | None:
    """The first file of the picture's name with one of these endings, of which any part may be in capitals."""
    for ending in endings:
        kind, dot, suffix = ending.rpartition(".")
        for spelled in (ending, ending.upper(), ending.title(), f"{kind}{dot}{suffix.upper()}",
                        f"{kind.title()}{dot}{suffix}"):
            if (other := path.with_name(path.stem + spelled)).is_file():
                return other
    return None


def _caption(path: Path) -> str:
    """The text beside a picture, with or without the mark that some editors put in front of UTF-8."""
    file = _beside(path, (".txt",))
    try:
        return file.read_text("utf-8-sig").strip() if file else ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.name} is not text in UTF-8; save it again in that encoding.") from error


def _pixels(path: Path) -> tuple[Tensor, Tensor | None]:
    """A picture's colours (h w 3) and alpha (h w), if it has one; of an animation the first frame."""
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            floating = image.mode == "F"
            if image.mode.startswith("I"):  # 16 bits of grey
                grey = np.asarray(image, dtype=np.float32).clip(0, 65535) / 257
                image = Image.fromarray(grey.astype(np.uint8))
            transparent = "A" in image.getbands() or "transparency" in image.info
            pixels = np.asarray(image.convert("RGBA" if transparent else "RGB"), dtype=np.float32) / 255
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path.name} cannot be read as a picture: {error}.") from error
    if floating:
        raise ValueError(f"{path.name} holds floating-point numbers; save it as PNG or JPEG.")
    picture = torch.from_numpy(pixels)
    return picture[..., :3], picture[..., 3] if transparent else None
