"""What a pretraining has learned so far, on subjects that it has not seen: errors, and pictures."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..host.clip_overlay import with_words
from ..host.copies import settle
from ..host.objective import timestep_count
from ..host.pictures import sample_picture
from ..host.sockets import CLIP, VAE, ModelPatcher
from ..textual_inversion.concept import Word
from ..textual_inversion.templates import fill
from .encoder import Encoder
from .method import PLACEHOLDER, Predictor
from .offsets import Offset
from .samples import Pair, Samples, draw_pair
from .tune import predict_each

SHOWN, STEPS = 4, 10
ROUNDS, BATCH = 8, 16


@dataclass(frozen=True)
class Look:
    """Pictures on the way: what decodes them, who is shown them with the number of steps so far, and the guidance."""

    vae: VAE
    show: Callable[[int, Tensor], None]
    cfg: float = 7.0


@torch.no_grad()
def errors(predictor: Predictor, encoder: Encoder, offsets: Mapping[str, Offset], held: Samples, times: float) -> str:
    """The error by word and offsets, and by word and values, beside that of the class word."""
    levels, found = timestep_count(predictor.model), []
    fresh = Encoder(encoder.shape).to(predictor.device)
    for used, edited in ((fresh, False), (encoder, False), (encoder, True)):
        with predictor.acting(used, {} if used is fresh else offsets):
            pairs = (to_device(draw_pair(held, levels, BATCH, 1, number, times=times), predictor.device)
                     for number in range(ROUNDS))
            found.append(torch.cat([predictor.loss(pair, edited, 0.0) for pair in pairs]).mean().item())
    return (f"error {found[1]:.4f} by word and offsets, {found[2]:.4f} by word and values, {found[0]:.4f} by the class "
            "word")


@torch.no_grad()
def pictures(predictor: Predictor, unet: ModelPatcher, clip: CLIP, look: Look, encoder: Encoder,
             offsets: Mapping[str, Offset], samples: Samples, seed: int) -> Tensor:
    """The first subjects as the VAE knows them, each above what its predicted word draws with the offsets (h w 3)."""
    columns = []
    for number in range(min(SHOWN, len(samples.latents))):
        place = torch.tensor([number]), torch.tensor([0])
        latent = samples.latents[place].float()
        seen = samples.pictures[place].float() / (1 if samples.vision else 255)
        with predictor.acting(encoder, offsets):
            (start,) = predict_each(predictor, seen, latent.to(predictor.device), seed)
        taught = with_words(clip, [Word(PLACEHOLDER, predictor.word, start.words)])
        with predictor.acting(encoder, offsets):
            drawn = sample_picture(unet, taught, look.vae, fill("a photo of a {}", PLACEHOLDER), latent.shape[1:],
                                   look.cfg, STEPS, seed)
        known = look.vae.decode(unet.model.process_latent_out(latent))[0].cpu().clamp(0, 1)
        settle(unet, clip.patcher)  # the VAE may have moved the UNet off the card
        columns.append(torch.cat([known, drawn]))
    return torch.cat(columns, 1)


def to_device(pair: Pair, device: torch.device) -> Pair:
    """The pair on the training device."""
    if device.type == "cpu":
        return pair
    moved = {name: value.to(device) for name, value in vars(pair).items() if isinstance(value, Tensor)}
    batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in vars(pair.batch).items()}
    return type(pair)(**{**vars(pair), **moved, "batch": type(pair.batch)(**batch)})
