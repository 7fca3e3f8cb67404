"""The uncentred covariance of an encoder's outputs; its inverse is the metric of the edit (Perfusion, section 4)."""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ..host.folders import covariances_folder
from ..host.progress import ProgressBar, stop_if_cancelled
from ..host.sockets import CLIP
from ..host.text import encode_batch, fingerprint_of, plain, ready, widths
from ..training.disk import read_safetensors, write_whole
from .concept import Edit
from .corpus import captions

BATCH = 32
FEW, MANY = 1e-3, 1e-6  # ridge, in shares of the mean variance, with fewer and with more than TOKENS tokens a dimension
TOKENS = 10
REMEMBERED = 4
log = logging.getLogger("concepts")
_remembered: dict[str, Tensor] = {}


def precision(clip: CLIP, own_text: str = "") -> Tensor:
    """C⁻¹ (d d), fp32 on the CPU and not to be changed, of the text encoder without LoRAs and learned words.

    C is measured on the captions that come with the pack, or on the lines of `own_text`, once for each encoder and
    clip-skip, and kept in the user folder. Raises ValueError when it cannot be inverted; Cancel leaves nothing behind.
    """
    texts = _lines(own_text) or own_captions()
    digest = hashlib.sha256("\n".join((fingerprint_of(clip), *texts)).encode()).hexdigest()[:24]
    if digest not in _remembered:
        _remembered[digest] = precision_of(*_covariance(clip, texts, digest))
        for oldest in list(_remembered)[:-REMEMBERED]:
            del _remembered[oldest]
    return _remembered[digest]


def precision_for(edit: Edit, clip: CLIP) -> Tensor | None:
    """The same for using an edit, and nothing for one that brings its own C⁻¹ i* along."""
    return precision(clip) if edit.dual is None else None


def corpus_name(own_text: str) -> str:
    """A digest of the lines of `own_text`, and '' for none."""
    lines = _lines(own_text)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] if lines else ""


@torch.inference_mode(False)
@torch.no_grad()
def uncentred(encodings: Iterable[Tensor], width: int) -> tuple[Tensor, int]:
    """C = Σ e eᵀ / n (d d) over tokens that come in pieces (t d), in double precision, and their number n."""
    total, count = torch.zeros(width, width, dtype=torch.float64), 0
    for tokens in encodings:
        tokens = tokens.double()
        total.addmm_(tokens.T, tokens)
        count += len(tokens)
    return total / max(count, 1), count


@torch.inference_mode(False)
@torch.no_grad()
def precision_of(covariance: Tensor, tokens: int) -> Tensor:
    """(C + λI)⁻¹ (d d), fp32, where λ is larger with few tokens. Raises ValueError when there is none."""
    size = len(covariance)
    covariance = covariance.double()
    ridge = (FEW if tokens < TOKENS * size else MANY) * covariance.trace() / size
    factor, failed = torch.linalg.cholesky_ex(covariance + ridge * torch.eye(size, dtype=torch.float64))
    inverse = factor if failed else torch.cholesky_inverse(factor).float()
    if failed or not inverse.isfinite().all():
        raise ValueError("The covariance of this text encoder cannot be inverted: its encodings are not usable "
                         "numbers; load another checkpoint or CLIP.")
    return inverse


def _lines(own_text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in own_text.splitlines() if line.strip())


@lru_cache(1)
def own_captions() -> tuple[str, ...]:
    """The captions that come with the pack."""
    return tuple(captions())


def _covariance(clip: CLIP, texts: Sequence[str], digest: str) -> tuple[Tensor, int]:
    """C (d d) and the number of tokens behind it, from the user folder or measured and put there."""
    path, width = covariances_folder() / f"{digest}.safetensors", sum(widths(clip).values())
    kept = _kept(path, width)
    if kept:
        return kept
    covariance, tokens = uncentred(_encodings(ready(plain(clip)), texts), width)
    covariance = covariance.float()  # as the file has it, so that results do not depend on where C came from
    try:
        write_whole(path, safetensors.torch.save({"covariance": covariance}, {"tokens": str(tokens)}))
    except ValueError as error:
        log.warning("The covariance of this text encoder will be measured again next time: %s", error)
    return covariance, tokens


def _kept(path: Path, width: int) -> tuple[Tensor, int] | None:
    """What a file holds; None when it is missing, damaged or of another encoder."""
    try:
        metadata, tensors = read_safetensors(path)
        covariance, tokens = tensors["covariance"], int(metadata["tokens"])
    except (KeyError, ValueError):
        return None
    usable = covariance.shape == (width, width) and bool(covariance.isfinite().all() and (covariance.diag() > 0).all())
    return (covariance, tokens) if usable else None


def _encodings(clip: CLIP, texts: Sequence[str]) -> Iterator[Tensor]:
    """The encodings (t d) of all tokens of some captions at a time, from start to end token, without padding."""
    bar = ProgressBar(len(texts))
    for start in range(0, len(texts), BATCH):
        stop_if_cancelled()
        batch = texts[start:start + BATCH]
        yield torch.cat(encode_batch(clip, batch))
        bar.update(len(batch))
