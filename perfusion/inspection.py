"""Which words of a prompt a concept touches, as a picture."""

import torch
from PIL import Image, ImageDraw, ImageFont

from ..host.sockets import CLIP
from ..host.text import encode, ready, widths, written_words
from ..textual_inversion.apply import apply_words
from ..textual_inversion.concept import Concept
from ..training.preview import FAINT, INK, LINE, PANEL, PAPER, RAW
from .apply import BIAS, TEMPERATURE
from .covariance import precision_for
from .edit import gate_of_kin, similarity
from .file import check_encoder

ROW, NAME_WIDTH, BAR_WIDTH = 26, 220, 360


@torch.no_grad()
def gates(clip: CLIP, concept: Concept, prompt: str, bias: float = BIAS,
          temperature: float = TEMPERATURE) -> list[tuple[str, float, float]]:
    """Each token of a prompt up to its end with its similarity to i* and its gate, as `apply` has it.

    Raises ValueError for another kind of text encoder.
    """
    check_encoder(concept, sum(widths(clip).values()))
    taught = apply_words(clip, concept, 1.0)
    target = concept.edit.target_input[None]
    dual = concept.edit.dual_under(precision_for(concept.edit, clip)).float()
    encodings = encode(ready(taught), prompt)[0][0].float().cpu()
    s = similarity(encodings, target, dual[None])[:, 0]
    open_ = gate_of_kin(s, bias, temperature)
    return [(word, s[place].item(), open_[place].item()) for place, word in enumerate(written_words(taught, prompt))]


def gate_bars(found: list[tuple[str, float, float]], title: str) -> Image.Image:
    """A bar for each token: how far the concept is switched on there, with the similarity beside it."""
    width, height = 16 + NAME_WIDTH + BAR_WIDTH + 150, 60 + ROW * len(found)
    image = Image.new("RGB", (width, height), PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(17)
    draw.text((16, 16), title, INK, ImageFont.load_default(20))
    for number, (word, s, amount) in enumerate(found):
        y, left = 52 + ROW * number, 16 + NAME_WIDTH
        draw.text((left - 12, y + ROW / 2), word, INK, font, anchor="rm")
        draw.rectangle((left, y + 3, left + BAR_WIDTH, y + ROW - 4), PANEL)
        end = left + max(1, round(BAR_WIDTH * amount))
        draw.rectangle((left, y + 3, end, y + ROW - 4), LINE if amount > 0.5 else RAW)
        figures = f"{abs(amount):.0%}  s {round(s, 2) + 0.0:.2f}"  # never -0
        draw.text((left + BAR_WIDTH + 10, y + ROW / 2), figures, FAINT, font, anchor="lm")
    return image
