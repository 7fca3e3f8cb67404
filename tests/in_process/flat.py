"""Reads many subjects and draws each of them once: `flat.py FOLDER`; prints by how many bytes more memory grew than for
a few subjects, and how many are on disk; for test_e4t_shards.py."""

import sys
from pathlib import Path

from scripts import script

HERE = Path(__file__).resolve().parent
launch = script(HERE.parents[1] / "microworld" / "launch.py")
launch.use_host()
launch.load_pack()

import psutil  # noqa: E402
import torch  # noqa: E402
from concepts_pack.e4t.encoder import Encoder, Shape  # noqa: E402
from concepts_pack.e4t.recognition import recognise  # noqa: E402
from concepts_pack.e4t.samples import draw_pair, read_samples  # noqa: E402
from PIL import Image  # noqa: E402

BATCH = 50
torch.set_num_threads(1)
home, peak = Path(sys.argv[1]), 0


def look():
    """Notes what memory is resident now."""
    global peak
    peak = max(peak, psutil.Process().memory_info().rss)


def encode(pictures):
    """Latents of 32 KB a view out of the mean colour."""
    look()
    return pictures.mean((1, 2, 3))[:, None, None, None].expand(-1, 4, 64, 64)


def use(subjects):
    """Reads a folder of so many pictures, and learns to recognise and draws all of them."""
    folder = home / f"{subjects}"
    folder.mkdir()
    for number in range(subjects):
        Image.new("RGB", (32, 32), (number % 256, 90, 200)).save(folder / f"{number:04d}.png")
    samples = read_samples(folder, 2, 32, 32, False, 0.1, 0, encode, "vae", home / "work")
    recognise(Encoder(Shape((8, 16), 4, {"clip_l": 4}, {"layer": 4}, side=32)), samples, subjects // BATCH, 0)
    for step in range(subjects // BATCH):
        draw_pair(samples, 1000, BATCH, 0, step)
        look()


use(100)
few = peak
use(2000)
sys.stdout.write(f"{peak - few} {sum(path.stat().st_size for path in (home / 'work').rglob('*.safetensors'))}")
