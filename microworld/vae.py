"""Train the TAESD-structure autoencoder on renders: `python3 dev.py run microworld/vae.py --minutes 12`."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from comfy.taesd.taesd import TAESD
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from .data import pictures, work
from .muon import Muon

CROP, BATCH, RATE = 64, 16, 1e-3


def new_taesd() -> TAESD:
    """A TAESD with fresh weights: He initialisation, last convolution of each residual block scaled down."""
    vae = TAESD().to(memory_format=torch.channels_last).requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in vae.named_parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            gain = 0.2 if ".conv.4." in name else 1.0
            parameter.data.normal_(0, gain * math.sqrt(2 / fan_in), generator=generator)
        elif name not in ("vae_scale", "vae_shift"):
            parameter.data.zero_()
    vae.vae_scale.requires_grad_(False)
    vae.vae_shift.requires_grad_(False)
    return vae


def crops(images: torch.Tensor, step: int) -> torch.Tensor:
    """BATCH random crops (b, 3, CROP, CROP) in -1..1 out of uint8 pictures (n, h, w, 3), half of them recoloured."""
    generator = torch.Generator().manual_seed(step)
    which = torch.randint(len(images), (BATCH,), generator=generator)
    corner = torch.randint(images.shape[1] - CROP + 1, (BATCH, 2), generator=generator)
    cut = torch.stack([images[i, y : y + CROP, x : x + CROP] for i, (y, x) in zip(which, corner, strict=True)])
    x = rearrange(cut, "b h w c -> b c h w").float().div(127.5).sub(1)
    recoloured = torch.randperm(3, generator=generator)
    x[::2] = x[::2, recoloured] * (0.5 + 0.5 * torch.rand(3, 1, 1, generator=generator))
    return x.to(memory_format=torch.channels_last)


def loss(vae: TAESD, x: torch.Tensor, step: int) -> torch.Tensor:
    """L1 on pixels, on their differences and on the mean colour of 8 x 8 patches.

    The decoder sees slightly noisy latents so that it forgives the UNet.
    """
    z = vae.encode(x)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(step))
    y = vae.decode(z + 0.02 * noise.to(z)).float()
    edges = sum(F.l1_loss(torch.diff(y, dim=d), torch.diff(x, dim=d)) for d in (2, 3))
    colour = F.l1_loss(F.avg_pool2d(y, 8), F.avg_pool2d(x, 8))
    return F.l1_loss(y, x) + edges + 2 * colour + 1e-4 * z.float().square().mean()


def save(vae: TAESD, target: Path) -> None:
    save_file({key: value.contiguous() for key, value in vae.state_dict().items()}, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--pictures", type=int, default=6000)
    args = parser.parse_args()
    images = torch.cat([torch.from_numpy(chunk[0]) for chunk in pictures(1, args.pictures)])
    vae, target = new_taesd(), work("vae.safetensors")
    if target.exists():
        vae.load_state_dict(load_file(target))
    trained = [p for p in vae.parameters() if p.requires_grad]
    muon = Muon([p for p in trained if p.ndim > 1])
    adam = torch.optim.AdamW([p for p in trained if p.ndim == 1], RATE, weight_decay=0)
    start, step, seen = time.monotonic(), 0, 0.0
    while (done := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        decay = min(1, (step + 1) / 50) * (1 - done)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(vae, crops(images, step), step)
        value.backward()
        adam.param_groups[0]["lr"] = RATE * decay
        adam.step()
        adam.zero_grad()
        muon.step(RATE * decay)
        step, seen = step + 1, 0.98 * seen + 0.02 * value.item()
        if step % 100 == 0:
            print(f"vae step {step} loss {seen / (1 - 0.98**step):.4f} done {done:.2f}", flush=True)
            save(vae, target)
    save(vae, target)


if __name__ == "__main__":
    main()
