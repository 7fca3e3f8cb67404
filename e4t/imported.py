"""The encoder of an imported release, as tuning knows encoders."""

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from .encoder import Predicted, Shape, Vision
from .release import ReleasedEncoder

IMPORTED = "e4t-diffusion"
TEXT = "clip_l"  # the text encoder of SD1.x


class ImportedEncoder(nn.Module):
    """Says the word alone, in numbers of its vector; the values of a concept then start as the layers make them.

    What a picture adds is one vector for all timesteps, so that is what it sees of a picture.
    """

    factor_rate, tuning_rate = 5e-4, 0.032  # together 1.6e-5, the published rate of the encoder
    word_rate, times, start, kept = 0.0, 1.0, 1.0, 1.0  # as published
    needs_vision = True
    hears_offsets = True  # in the published code one UNet, with its offsets, is heard and denoises

    def __init__(self, released: ReleasedEncoder) -> None:
        super().__init__()
        self.released = released

    @property
    def shape(self) -> Shape:
        """What it hears and says."""
        first, final = self.released.unet_feature_embedder[0], self.released.final_linear
        levels = (first.out_features,) * len(self.released.image_linears.firsts)
        return Shape(levels, first.in_features, {TEXT: final.out_features}, {}, stem=False, width=first.out_features)

    def tensors(self) -> dict[str, Tensor]:
        """What its file holds."""
        return self.released.tensors()

    def header(self) -> dict[str, str]:
        """What the header of its file says."""
        return {"e4t.kind": IMPORTED}

    def seen(self, pictures: Tensor, vision: Vision) -> Tensor:
        """What pictures (b h w 3) in 0..1 add at every timestep (b width), resized as in the published code.

        Raises ValueError for a CLIP vision of other sizes.
        """
        resized = interpolate(pictures.movedim(-1, 1), (vision.side, vision.side), mode="bicubic", align_corners=True)
        with torch.inference_mode(False), torch.no_grad():
            return self.released.image_part(*vision.patches(resized.movedim(1, -1)))

    def unit(self, rows: Tensor) -> float:
        """What a predicted 1 means beside the class word's rows (t d)."""
        return 1.0

    def image_part(self, seen: Tensor) -> Tensor:
        """(b width) -> (b width)."""
        return seen

    def forward(self, image_part: Tensor, unet_features: Tensor) -> Predicted:
        """(b width), (b u) -> offsets. Raises ValueError for features of another UNet."""
        return Predicted({TEXT: self.released(image_part, unet_features)}, {})
