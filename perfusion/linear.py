"""What takes the gate's place where there can be none: the linear function that tells a concept's word apart best.

Under the paper's <a, b> = aᵀ C⁻¹ b the tokens behind the word, which have read it, are up to 0.97 as similar to i* as
the word itself, and prompts are filled up to 77 tokens. Here the metric is that of C + R + S, where R is the uncentred
covariance of the tokens behind the word and S how far the word itself strays from i*. Of all linear functions that are
1 at i*, its s(e) = <i*, e> / <i*, i*> is the least, in mean square, on captions and behind the word, and the steadiest
on the word.
"""

from random import Random

import torch
from torch import Tensor

from ..host.sockets import CLIP
from ..host.text import encode, plain, ready, widths, word_places
from ..textual_inversion.apply import apply_words
from ..textual_inversion.concept import Concept
from ..textual_inversion.templates import fill
from .covariance import own_captions, precision
from .file import check_encoder

FORMS = ("a photo of {{}}, {}", "{}, {{}}", "a {{}} {}")
PROMPTS = 48
RIDGE = 1e-6  # of the mean variance


@torch.inference_mode(False)
@torch.no_grad()
def linear_dual(clip: CLIP, concept: Concept) -> Tensor:
    """(C + R + S)⁻¹ i* (d), in double precision on the CPU, of a concept with an edit; the text encoder's LoRAs do not
    count.

    With R + S = L Lᵀ it is P i* - P L (1 + Lᵀ P L)⁻¹ Lᵀ P i* for P = C⁻¹ (Woodbury). Raises ValueError for another kind
    of text encoder.
    """
    (word,), target = concept.words, concept.edit.target_input.double()
    check_encoder(concept, sum(widths(clip).values()))
    metric, taught = precision(clip).double(), ready(apply_words(plain(clip), concept, 1.0))
    behind, word_itself = [], []
    for prompt in _prompts(word.placeholder):
        encoding = encode(taught, prompt)[0][0].cpu().double()
        place = word_places(taught, prompt, word.vectors)[0]
        behind.append(encoding[place + 1:])
        word_itself.append(encoding[place])
    read, strays = torch.cat(behind), torch.stack(word_itself) - target
    spread = read.T @ read / len(read) + strays.T @ strays / len(strays)
    spread.diagonal().add_(RIDGE * spread.trace() / len(spread))
    factor = torch.linalg.cholesky(spread)
    own, through = metric @ target, metric @ factor
    inner = factor.T @ through
    inner.diagonal().add_(1)
    return own - through @ torch.linalg.solve(inner, factor.T @ own)


def _prompts(placeholder: str) -> list[str]:
    captions = Random(0).sample(own_captions(), PROMPTS)
    return [fill(FORMS[number % len(FORMS)].format(caption), placeholder) for number, caption in enumerate(captions)]
