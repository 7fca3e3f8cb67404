"""What the downward half of the host's UNet makes of a noised latent."""

import torch
from comfy.model_base import BaseModel
from torch import Tensor

from .objective import denoising_error


class _Enough(Exception):
    """Thrown once the last of these blocks has run."""


@torch.no_grad()
def unet_features(model: BaseModel, latents: Tensor, noise: Tensor, timesteps: Tensor, context: Tensor,
                  pooled: Tensor | None) -> Tensor:
    """The spatial means of every input block's output and of the middle block's, side by side (b u), fp32.

    E4T's encoder hears these of a pass under the empty prompt: `latents`, `noise` (b c h w) as in
    `denoising_error`, `timesteps` (b), `context` (1 n d) and `pooled` (1 p) of "". The upward half does not run.
    """
    unet, means = model.diffusion_model, []
    blocks = [block for block in (*unet.input_blocks, unet.middle_block) if block is not None]  # KOALA has no middle

    def keep(module: torch.nn.Module, inputs: tuple, output: Tensor) -> None:
        means.append(output.float().mean((2, 3)))
        if module is blocks[-1][-1]:
            raise _Enough

    # The host calls the layers of a block one by one, never the block.
    hooks = [block[-1].register_forward_hook(keep) for block in blocks]
    try:
        denoising_error(model, latents, noise, timesteps, context, pooled)
    except _Enough:
        return torch.cat(means, 1)
    finally:
        for hook in hooks:
            hook.remove()
    raise RuntimeError("The UNet ran without the last of its downward blocks.")
