"""Global key locking (Perfusion): the whole prompt's keys are those of the super-category's prompt."""

import torch

from ..host.clip_overlay import instead, word_numbers, words_in
from ..host.key_text import Conditioning, conditioning_of, with_key_text
from ..host.sockets import CLIP
from ..host.text import ready, rows, widths
from ..textual_inversion.concept import Word
from .alignment import places_in


def encode_with_global_keys(clip: CLIP, text: str) -> Conditioning:
    """`text` as CLIP Text Encode encodes it, with the keys of the same text that has class words for learned words.

    Without a learned word in it nothing differs from CLIP Text Encode. Where a class word has more or fewer tokens
    than the learned word, its keys are passed over or repeated, so that each other token keeps the key of its like.
    Raises ValueError for a word without a class word, for text encoders of models without key layers for text, and
    where the host encodes nothing.
    """
    conditioning, words = conditioning_of(clip, text), words_in(clip, text)
    if not conditioning:
        raise ValueError("The hooks on this CLIP leave nothing to encode; turn schedule_clip off in Set CLIP Hooks.")
    if not words:
        return conditioning
    sizes = list(widths(clip).values())
    if any(context.shape[-1] != sum(sizes) for context, _ in conditioning):
        raise ValueError(f"Keys cannot be locked for a text encoder like {type(clip.cond_stage_model).__name__}; use "
                         "one of SD1.x, SD2.x or SDXL.")
    ordinary = instead(clip, [_as_class_word(clip, word) for word in words])
    numbers, others = word_numbers(clip, text), word_numbers(ordinary, text)
    places = [places_in(numbers[encoder], others[encoder]) for encoder in widths(clip)]
    return with_key_text(conditioning, [
        torch.cat([part[:, at[:written.shape[1]].clamp(max=part.shape[1] - 1)]  # as the host cuts a pair's
                   for part, at in zip(encoding.split(sizes, -1), places, strict=True)], -1)
        for (written, _), (encoding, _) in zip(conditioning, conditioning_of(ordinary, text), strict=True)
    ])


def _as_class_word(clip: CLIP, word: Word) -> Word:
    vectors = {name: row for name, row in rows(ready(clip), word.class_word).items() if name in word.vectors}
    if not all(len(row) for row in vectors.values()):
        raise ValueError(f"{word.placeholder} came without a class word, so there are no keys to lock it to; train it "
                         "anew, or encode this prompt with CLIP Text Encode.")
    return Word(word.placeholder, word.class_word, vectors)
