"""Gives a CLIP words of its own: a placeholder in a prompt stands for vectors in memory instead of a file on disk."""

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Protocol

from comfy.sd import CLIP
from comfy.sd1_clip import SDTokenizer
from torch import Tensor, equal


class Word(Protocol):
    """What the overlay needs of a learned word; `vectors` maps an encoder's name (`clip_l`) to a tensor (n d)."""

    placeholder: str
    class_word: str
    vectors: Mapping[str, Tensor]


class _WordTokenizer:
    """Mixed into a copy of one encoder's tokenizer.

    `learned_words` maps placeholders in lower case to words; `without_folders` is the original, finding no files.
    """

    learned_words: dict[str, Word]
    without_folders: SDTokenizer

    def tokenize_with_weights(self, text: str, *args, **kwargs):
        return super().tokenize_with_weights(self._spell_out(text), *args, **kwargs)

    def _spell_out(self, text: str) -> str:
        """Turns `<mine>` into ` embedding:…`, or into its class word for an encoder that learned nothing of it."""

        def spell(match: re.Match) -> str:
            if match["word"] is None:
                return match[0]
            word = _meant(self.learned_words, match["word"])
            known = self.embedding_key in word.vectors
            return f" {self.embedding_identifier}{_key(word.placeholder)} " if known else word.class_word

        return _pattern(self.learned_words).sub(spell, text)

    def _try_get_embedding(self, embedding_name: str):
        if not embedding_name.strip():  # the host would look for its first word
            return self.without_folders._try_get_embedding("nothing")
        name = embedding_name.split(" ", 1)[0]
        for word in self.learned_words.values():
            if name == _key(word.placeholder):
                _, *rest = self.without_folders._try_get_embedding(embedding_name)  # two or three answers, by host
                return word.vectors[self.embedding_key], *rest
        return super()._try_get_embedding(embedding_name)


def with_words(clip: CLIP, words: Iterable[Word]) -> CLIP:
    """Returns a clone of `clip` that understands `words`, besides those an earlier overlay gave it.

    Vectors enter the token lists as they are, so a leaf tensor among them receives gradients.
    Raises ValueError when a placeholder already stands for other vectors.
    """
    words = list(words)
    overlaid = clip.clone()
    overlaid.tokenizer = copy.copy(clip.tokenizer)
    tokenizers = {name: inner for name, inner in vars(clip.tokenizer).items() if isinstance(inner, SDTokenizer)}
    if not tokenizers:
        raise ValueError(f"Learned words cannot be given to a text encoder like {type(clip.tokenizer).__name__}.")
    for name, inner in tokenizers.items():
        setattr(overlaid.tokenizer, name, _overlay(inner, words))
    return overlaid


def words_in(clip: CLIP, text: str) -> list[Word]:
    """The learned words of overlays on `clip` that occur in `text`, each once."""
    known = {placeholder: word for tokenizer in _overlaid(clip).values()
             for placeholder, word in tokenizer.learned_words.items()}
    met = [match["word"] for match in _pattern(known).finditer(text)] if known else []
    return list({word.placeholder: word for word in (_meant(known, written) for written in met if written)}.values())


def instead(clip: CLIP, words: Iterable[Word]) -> CLIP:
    """A clone of `clip` in which placeholders that it knows stand for `words` instead."""
    changed = {word.placeholder.lower(): word for word in words}
    other = clip.clone()
    other.tokenizer = copy.copy(clip.tokenizer)
    for name, tokenizer in _overlaid(clip).items():
        inner = copy.copy(tokenizer)
        inner.learned_words = tokenizer.learned_words | changed
        setattr(other.tokenizer, name, inner)
    return other


def word_numbers(clip: CLIP, text: str) -> dict[str, list[list[int]]]:
    """For each encoder and section the word that each token belongs to; 0 for start, end and padding.

    A learned word is one of these words, and so is the text between two.
    """
    return {name: [[number for *_, number in section]
                   for section in tokenizer.tokenize_with_weights(text, return_word_ids=True)]
            for name, tokenizer in _overlaid(clip).items()}


def _overlaid(clip: CLIP) -> dict[str, _WordTokenizer]:
    return {name: inner for name, inner in vars(clip.tokenizer).items() if isinstance(inner, _WordTokenizer)}


def _overlay(tokenizer: SDTokenizer, words: list[Word]) -> SDTokenizer:
    known = dict(getattr(tokenizer, "learned_words", {}))
    for word in words:
        _refuse_clash(known.get(word.placeholder.lower()), word)
        known[word.placeholder.lower()] = word
    overlaid = copy.copy(tokenizer)
    if not isinstance(tokenizer, _WordTokenizer):
        overlaid.__class__ = type(f"Word{type(tokenizer).__name__}", (_WordTokenizer, type(tokenizer)), {})
        overlaid.embedding_directory = tokenizer.embedding_directory or []
        overlaid.without_folders = copy.copy(tokenizer)
        overlaid.without_folders.embedding_directory = []
    overlaid.learned_words = known
    return overlaid


def _refuse_clash(old: Word | None, new: Word) -> None:
    if old is None or old is new:
        return
    pairs = [(old.vectors[name].cpu(), new.vectors[name].cpu()) for name in old.vectors.keys() & new.vectors.keys()]
    if not len(pairs) == len(old.vectors) == len(new.vectors) or not all(equal(a, b) for a, b in pairs):
        raise ValueError(
            f"{new.placeholder} already stands for another learned word in this CLIP; "
            "give one of the two another placeholder where it is trained, or in Load Concept once it is saved."
        )


def _pattern(words: Mapping[str, Word]) -> re.Pattern:
    """Matches any placeholder in any case, the longest first, and none inside a longer word: the group `word`.

    An `embedding:` before it belongs to the match. One before the name of a file is a match without a word.
    """
    longest_first = sorted((word.placeholder for word in words.values()), key=len, reverse=True)
    any_word = "|".join(rf"(?<![\w-]){re.escape(p)}(?![\w-])" if p[0] != "<" else re.escape(p)
                        for p in longest_first)
    return re.compile(rf"(?P<prefix>embedding:\s*)?(?P<word>{any_word})(?(prefix)(?![./\\]\w))"
                      r"|embedding:\s*[^\s,()<\[]*", re.IGNORECASE)


def _meant(words: Mapping[str, Word], written: str) -> Word:
    """The word that `written` means, as `_pattern` compares them: lower case is not one to one in every script."""
    return next(word for word in words.values() if re.fullmatch(re.escape(word.placeholder), written, re.IGNORECASE))


def _key(placeholder: str) -> str:
    """A name for the host's `embedding:` syntax: no space, comma or bracket ends it, and it never reads as a weight."""
    return f"learned_{placeholder.lower().encode().hex()}_word"
