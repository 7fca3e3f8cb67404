"""Text in a CLIP: encoding without the host's model loading, embedding rows, and sizes."""

from collections.abc import Sequence
from math import lcm

import torch
from comfy.sd import CLIP
from comfy.sd1_clip import SDClipModel, SDTokenizer
from torch import Tensor


def encoders(clip: CLIP) -> dict[str, SDClipModel]:
    """The text encoders of `clip` by the host's names: `clip_l`, `clip_g`, `clip_h`."""
    return {n: m for n, m in clip.cond_stage_model.named_children() if isinstance(m, SDClipModel)}


def widths(clip: CLIP) -> dict[str, int]:
    """How many numbers one vector of each encoder has."""
    return {name: _embedding(encoder).embedding_dim for name, encoder in encoders(clip).items()}


def encode(clip: CLIP, text: str) -> tuple[Tensor, Tensor | None]:
    """Encodes `text` to a context (1 n d) and the pooled vector (1 p) with the weights where they are.

    `clip.encode_from_tokens` would first let the host make room, which may push out a UNet that is being trained.
    """
    model = clip.cond_stage_model
    model.reset_clip_options()
    if clip.layer_idx is not None:
        model.set_clip_options({"layer": clip.layer_idx})
    model.set_clip_options({"execution_device": clip.patcher.load_device})
    context, pooled, *_ = model.encode_token_weights(clip.tokenize(text))
    return context, pooled


def encode_all(clip: CLIP, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """Encodes each distinct one of `texts` once: contexts (b n d) and pooled vectors (b p).

    Prompts of several sections are longer; the others are repeated to their length, as the host's sampler does.
    """
    encoded = {text: encode(clip, text) for text in dict.fromkeys(texts)}
    length = lcm(*(context.shape[1] for context, _ in encoded.values()))
    contexts = [encoded[text][0] for text in texts]
    pooled = [encoded[text][1] for text in texts]
    return (torch.cat([context.repeat(1, length // context.shape[1], 1) for context in contexts]),
            None if pooled[0] is None else torch.cat(pooled))


def ready(clip: CLIP) -> CLIP:
    """Lets the host load the weights, and returns `clip`."""
    clip.load_model()
    return clip


def rows(clip: CLIP, text: str) -> dict[str, Tensor]:
    """The embedding rows (n d), fp32 on the CPU, that each encoder looks up for `text`; no start, end or padding."""
    return {name: _rows(clip, name, encoder, text) for name, encoder in encoders(clip).items()}


def is_ordinary_word(clip: CLIP, word: str) -> bool:
    """Whether some encoder's vocabulary has `word` as one token of its own, so that prompts already use it."""
    return any(f"{word.lower()}</w>" in tokenizer.tokenizer.get_vocab() for tokenizer in _tokenizers(clip).values())


def vocabulary(clip: CLIP, encoder: str) -> tuple[list[str], Tensor]:
    """The whole words of an encoder's vocabulary and their embedding rows (v d), on the CPU."""
    tokens = _tokenizers(clip)[encoder].tokenizer.get_vocab()
    words = {token.removesuffix("</w>"): row for token, row in tokens.items() if token.endswith("</w>")}
    table = _embedding(encoders(clip)[encoder]).weight.detach().cpu()
    return list(words), table[list(words.values())]


def _tokenizers(clip: CLIP) -> dict[str, SDTokenizer]:
    return {name: t for name, t in vars(clip.tokenizer).items() if isinstance(t, SDTokenizer)}


def _embedding(encoder: SDClipModel) -> torch.nn.Embedding:
    return encoder.transformer.get_input_embeddings()


def _rows(clip: CLIP, name: str, encoder: SDClipModel, text: str) -> Tensor:
    tokenizer = _tokenizers(clip)[name]
    sections = tokenizer.tokenize_with_weights(text)
    tokens = [token for section in sections for token, _ in section[tokenizer.tokens_start:]]
    words = [t for t in tokens if isinstance(t, Tensor) or t not in (tokenizer.end_token, tokenizer.pad_token)]
    table = _embedding(encoder)

    def vector(token: int | Tensor) -> Tensor:
        if isinstance(token, Tensor):
            return token
        return table(torch.tensor([token], device=table.weight.device), out_dtype=torch.float32)

    vectors = [vector(token).reshape(1, -1).cpu() for token in words]
    return torch.cat(vectors) if vectors else torch.zeros(0, table.embedding_dim)
