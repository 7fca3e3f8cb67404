"""Trains the toy model and may kill itself on the way: `killed.py OUTPUT STEP`; for test_resume.py."""

import hashlib
import os
import signal
import sys
from pathlib import Path

from scripts import script

HERE = Path(__file__).resolve().parent
launch = script(HERE.parents[1] / "microworld" / "launch.py")
launch.use_host()
launch.load_pack()
toys = script(HERE / "conftest.py")

import comfy.utils  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from concepts_pack.textual_inversion.file import to_bytes  # noqa: E402
from concepts_pack.textual_inversion.train import Keeping, Preview, Recipe, learn_word  # noqa: E402
from concepts_pack.training.dataset import gather  # noqa: E402

output, die_at = Path(sys.argv[1]), int(sys.argv[2])
folder_paths.output_directory = str(output)
heard = []


def hear(value, total, *_, **__):
    """Count steps, and die without a word at one of them."""
    if total == 7:
        heard.append(value)
        if value == die_at:
            os.kill(os.getpid(), signal.SIGKILL)


comfy.utils.set_progress_bar_global_hook(hear)
photos = torch.rand(3, 64, 64, 3, generator=torch.Generator().manual_seed(4))
recipe = Recipe("<mine>", "cat", steps=7, learning_rate=0.01, batch_size=2, seed=5)
lesson = learn_word(toys.make_model(), toys.make_clip(), toys.make_vae(), gather([photos]), recipe,
                    Preview(every=0, steps=1), Keeping(every=2))
sys.stdout.write(f"{len(heard)} {hashlib.sha256(to_bytes(lesson.concept)).hexdigest()} {lesson.losses}")
