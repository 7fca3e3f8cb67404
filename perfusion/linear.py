"""What takes the gate's place where there can be none: the linear function that tells a concept's word apart best.

Under the paper's <a, b> = aᵀ C⁻¹ b the tokens behind the word, which have read it, are up to 0.97 as similar to i* as
the word itself, and prompts are filled up to 77 tokens. Here the metric is that of C + R + S, where R is the uncentred
covariance of the tokens behind the word and S how far the word itself strays from i*. Of all linear functions that are
1 at i*, its s(e) = <i*, e> / <i*, i*> is the least, in mean square, on captions and behind the word, and the steadiest
on the word.
"""

import hashlib
from random import Random

import torch
from torch import Tensor

from ..host.sockets import CLIP
from ..host.text import encode, plain, ready, widths, word_places
from ..textual_inversion.apply import apply_words
from ..textual_inversion.concept import Concept
from ..textual_inversion.templates import fill
from .covariance import encoder_fingerprint, own_captions, precision

FORMS = ("a photo of {{}}, {}", "{}, {{}}", "a {{}} {}")
PROMPTS = 48
RIDGE = 1e-6  # of the mean variance
REMEMBERED = 64
_remembered: dict[str, Tensor] = {}


def linear_dual_of(clip: CLIP, concept: Concept) -> Tensor:
    """(C + R + S)⁻¹ i* (d), fp32 on the CPU and not to be changed, of a concept with an edit, with this text encoder
    without LoRAs; measured once for each concept. Raises ValueError for another kind of text encoder."""
    (word,) = concept.words
    given, here = len(concept.edit.target_input), sum(widths(clip).values())
    if given != here:
        raise ValueError(f"{word.placeholder} was learned with a text encoder that gives {given} numbers for a token; "
                         f"this CLIP gives {here}: take model and CLIP from one checkpoint.")
    digest = hashlib.sha256(encoder_fingerprint(clip).encode())
    for tensor in (concept.edit.target_input, *word.vectors.values()):
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    name = digest.hexdigest()
    if name not in _remembered:
        metric, taught = precision(clip), ready(apply_words(plain(clip), concept, 1.0))
        vectors = len(next(iter(word.vectors.values())))
        _remembered[name] = linear_dual(taught, word.placeholder, vectors, concept.edit.target_input, metric)
        for oldest in list(_remembered)[:-REMEMBERED]:
            del _remembered[oldest]
    return _remembered[name]


def linear_dual(clip: CLIP, placeholder: str, vectors: int, target: Tensor, precision: Tensor) -> Tensor:
    """(C + R + S)⁻¹ i* (d), fp32 on the CPU, for i* (d), C⁻¹ (d d) and a CLIP that knows the word and is loaded.

    `vectors` is how many the word has.
    """
    behind, word = _read(clip, placeholder, vectors)
    target = target.cpu().double()
    return (_with_spread(precision, behind, word - target) @ target).float()


@torch.inference_mode(False)
@torch.no_grad()
def _read(clip: CLIP, placeholder: str, vectors: int) -> tuple[Tensor, Tensor]:
    """Encodings of all tokens behind the word in some prompts (t d), and of the word's last token in each (n d)."""
    behind, word = [], []
    for prompt in _prompts(placeholder):
        encoding = encode(clip, prompt)[0][0].cpu().double()
        place = word_places(clip, prompt, vectors)[0]
        behind.append(encoding[place + 1:])
        word.append(encoding[place])
    return torch.cat(behind), torch.stack(word)


@torch.inference_mode(False)
@torch.no_grad()
def _with_spread(precision: Tensor, *samples: Tensor) -> Tensor:
    """(C + Σ E[x xᵀ])⁻¹ (d d) for P = C⁻¹ and samples x (n d), in double precision.

    With L Lᵀ for the sum it is P - P L (1 + Lᵀ P L)⁻¹ Lᵀ P (Woodbury).
    """
    metric, spread = precision.cpu().double(), sum(x.T @ x / len(x) for x in samples)
    spread.diagonal().add_(RIDGE * spread.trace() / len(spread))
    factor = torch.linalg.cholesky(spread)
    through = metric @ factor
    inner = factor.T @ through
    inner.diagonal().add_(1)
    return metric - through @ torch.linalg.solve(inner, through.T)


def _prompts(placeholder: str) -> list[str]:
    captions = Random(0).sample(own_captions(), PROMPTS)
    return [fill(FORMS[number % len(FORMS)].format(caption), placeholder) for number, caption in enumerate(captions)]
