"""Pretrains a toy domain as one of several processes and may kill itself: `ranks.py OUTPUT STEP`; for
test_e4t_pretrain.py, which sets the variables that torchrun sets."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    from scripts import script

    launch = script(HERE.parents[1] / "microworld" / "launch.py")
    launch.use_host()
    launch.load_pack()
    toys = script(HERE / "conftest.py")

import torch  # noqa: E402
from concepts_pack.e4t.domain import save  # noqa: E402
from concepts_pack.e4t.learner import Recipe  # noqa: E402
from concepts_pack.e4t.pretrain import Keeping, pretrain  # noqa: E402
from concepts_pack.e4t.samples import Samples  # noqa: E402
from concepts_pack.e4t.workers import Workers  # noqa: E402


def samples(subjects=6, views=2):
    """Noise of the right shapes."""
    generator = torch.Generator().manual_seed(7)
    pictures = torch.randint(256, (subjects, views, 32, 32, 3), generator=generator, dtype=torch.uint8)
    latents = torch.randn(subjects, views, 4, 8, 8, generator=generator).half()
    return Samples(pictures, latents, torch.ones(subjects, views, 1, 8, 8).half())


def in_memory(stored):
    """The same samples as tensors."""
    subjects, views = stored.latents.shape[:2]
    every = torch.arange(subjects)[:, None], torch.arange(views)
    return replace(stored, pictures=stored.pictures[every], latents=stored.latents[every],
                   weights=stored.weights[every], source="")


RECIPE = Recipe("cat", steps=5, batch_size=4, warmup=0, levels=(8, 16), side=32)

if __name__ == "__main__":
    output, die_at = Path(sys.argv[1]), int(sys.argv[2])
    workers = Workers()

    def watch(step, loss):
        """Tell the step; die without a word in the last process."""
        sys.stderr.write(f"step {step}\n")
        if step == die_at and workers.rank == workers.count - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    own = Keeping(output / f"disk{workers.rank}")  # as on machines that share none
    domain = pretrain(toys.make_model(), toys.make_clip(), samples(), RECIPE, own, torch.eye(toys.WIDTH), workers,
                      watch=watch)
    if workers.first:
        save(domain, output, "domain")
    workers.close()
