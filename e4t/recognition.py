"""What an image stem of its own learns first: to tell the subjects of a domain apart.

The paper's encoder hears CLIP vision, which has learned to see long before. A new stem has not, and the denoising error
alone teaches it slowly.
"""

import torch
from einops import rearrange
from torch.nn.functional import cross_entropy, normalize

from ..host.progress import stop_if_cancelled
from ..training.draws import seeded
from .encoder import Encoder
from .samples import Samples

SUBJECTS, RATE, TEMPERATURE = 64, 1e-3, 0.1


def recognise(encoder: Encoder, samples: Samples, steps: int, seed: int) -> None:
    """Teaches the stem that two views show one subject, and those of others another (InfoNCE; SimCLR, section 2.1)."""
    subjects, views = samples.pictures.shape[:2]
    heard = encoder.heard_parameters()
    if not heard or subjects < 2 or views < 2 or not steps:
        return
    device = heard[0].device
    optimiser = torch.optim.AdamW(heard, lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    for step in range(steps):
        stop_if_cancelled()
        generator = seeded(seed, "recognised", step)
        chosen = torch.randperm(subjects, generator=generator)[:SUBJECTS]
        first = torch.randint(views, (len(chosen),), generator=generator)
        other = (first + torch.randint(1, views, (len(chosen),), generator=generator)) % views
        pictures = samples.pictures[chosen[:, None], torch.stack([first, other], 1)].to(device).float() / 255
        said = normalize(encoder.image_part(rearrange(pictures, "b two h w c -> (b two) h w c")), dim=1)
        one, two = rearrange(said, "(b two) d -> two b d", two=2)
        likeness, same = one @ two.T / TEMPERATURE, torch.arange(len(chosen), device=device)
        loss = (cross_entropy(likeness, same) + cross_entropy(likeness.T, same)) / 2
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
