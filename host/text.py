"""Text in a CLIP: encoding without the host's model loading, embedding rows, and sizes."""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from itertools import cycle
from math import lcm
from uuid import uuid4

import torch
from comfy.sd import CLIP
from comfy.sd1_clip import SDClipModel, SDTokenizer
from einops import rearrange
from torch import Tensor

UNUSED = ("text_projection.weight", "logit_scale")  # SD1.x checkpoints lack them; the host leaves memory as it was


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
    context, pooled, *_ = _encoder_at_work(clip).encode_token_weights(clip.tokenize(text))
    return context, pooled


def word_places(clip: CLIP, text: str, vectors: Mapping[str, Tensor]) -> list[int]:
    """Where in its encoding the vectors of a learned word end, once for each time `text` has the word.

    `vectors` (n d), by encoder, are those that `clip` was given for it: the same numbers in the same place in memory,
    which tells it from other learned words. Encoders of a pair have the same places.
    """
    name, sections = next(iter(clip.tokenize(text).items()))
    own = vectors[f"clip_{name}"].detach()
    known = {row.data_ptr() for row in own}
    given = [isinstance(token, Tensor) and token.data_ptr() in known for section in sections for token, *_ in section]
    return [place for place, here in enumerate(given) if here][len(own) - 1::len(own)]


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


def encode_words(clip: CLIP, texts: Sequence[str], vectors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Encodes the first section of each of `texts` in one go, each with its own vectors for a learned word of `clip`.

    Gradients flow into `vectors` (b n d), by encoder, which replace those that the word has. Contexts (b t d) and
    pooled vectors (b p). Weights in brackets are not heeded.
    """
    _encoder_at_work(clip)
    sections = [{name: parts[0] for name, parts in clip.tokenize(text).items()} for text in texts]
    contexts = []
    for name, encoder in encoders(clip).items():
        lists = [_with_vectors([token for token, *_ in section[name.removeprefix("clip_")]], own)
                 for section, own in zip(sections, vectors[name], strict=True)]
        context, pooled, *_ = encoder.encode(lists)
        contexts.append(context)
    return torch.cat(contexts, -1), pooled


def encode_batch(clip: CLIP, texts: Sequence[str]) -> list[Tensor]:
    """Encodes the first section of each of `texts` in one go, without gradients: (t d) each, fp32, on the CPU.

    t counts the tokens from the start to the first end token; padding is left out. The host takes the sections of one
    prompt as a batch; here each is a prompt of its own.
    """
    sections = [{name: parts[0] for name, parts in clip.tokenize(text).items()} for text in texts]
    together = {name: [section[name] for section in sections] for name in sections[0]}
    with torch.inference_mode(False), torch.no_grad():
        context, *_ = _encoder_at_work(clip).encode_token_weights(together)
        contexts = rearrange(context.float().cpu(), "1 (b n) d -> b n d", b=len(texts))
    end = next(iter(_tokenizers(clip).values())).end_token
    lengths = [[isinstance(token, int) and token == end for token, *_ in section].index(True) + 1
               for section in next(iter(together.values()))]
    return [context[:length] for context, length in zip(contexts, lengths, strict=True)]


def written_words(clip: CLIP, text: str) -> list[str]:
    """The tokens of the first section of `text`, from its start to its end token, as people read them."""
    tokenizer = next(iter(_tokenizers(clip).values()))
    words = []
    for token, *_ in next(iter(clip.tokenize(text).values()))[0]:
        learned = isinstance(token, Tensor)
        words.append("learned word" if learned else tokenizer.tokenizer.decode([token]))
        if not learned and token == tokenizer.end_token:
            break
    return words


def plain(clip: CLIP) -> CLIP:
    """A clone of `clip` as its checkpoint has it: no LoRAs, hooks, learned words, embeddings or weighting of words."""
    bare = clip.clone()
    if bare.patcher.patches:
        bare.patcher.patches, bare.patcher.patches_uuid = {}, uuid4()
    bare.patcher.injections, bare.patcher.is_injected = {}, False
    bare.patcher.hook_patches, bare.patcher.forced_hooks = {}, None
    bare.tokenizer = copy.copy(clip.tokenizer)
    for name, tokenizer in _tokenizers(clip).items():
        inner = copy.copy(getattr(tokenizer, "without_folders", tokenizer))
        inner.embedding_directory, inner.disable_weights = None, True
        setattr(bare.tokenizer, name, inner)
    return bare


def fingerprint_of(clip: CLIP) -> str:
    """A digest of the first numbers of every weight, without what LoRAs changed in them, and of the layer taken.

    It is the same in half and in single precision, and without the weights in `UNUSED`.
    """
    digest = hashlib.sha256(repr(_layers(clip)).encode())
    for name, ((weight, _), *_) in clip.patcher.get_key_patches().items():
        if not name.endswith(UNUSED):
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(weight.reshape(-1)[:32].half().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


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
    tokenizer = _tokenizers(clip)[encoder].tokenizer
    whole = [row for token, row in tokenizer.get_vocab().items() if token.endswith("</w>")]
    table = _embedding(encoders(clip)[encoder]).weight.detach().cpu()
    return [tokenizer.decode([row]) for row in whole], table[whole]


def _with_vectors(tokens: list[int | Tensor], vectors: Tensor) -> list[int | Tensor]:
    """Tokens with `vectors` (n d) in place of the learned ones among them, from the first again after the last."""
    own = cycle(vectors.unbind(0))
    return [next(own) if isinstance(token, Tensor) else token for token in tokens]


def _encoder_at_work(clip: CLIP) -> torch.nn.Module:
    """The text model with this clip's layer and device set."""
    model = clip.cond_stage_model
    model.reset_clip_options()
    if clip.layer_idx is not None:
        model.set_clip_options({"layer": clip.layer_idx})
    model.set_clip_options({"execution_device": clip.patcher.load_device})
    return model


def _layers(clip: CLIP) -> dict[str, int]:
    """The layer, counted from 0, whose output each encoder gives; their number for the last one's after its norm."""
    _encoder_at_work(clip)

    def taken(encoder: SDClipModel) -> int:
        layer = encoder.num_layers if encoder.layer == "last" else encoder.layer_idx % encoder.num_layers
        return layer + (layer == encoder.num_layers - 1 and encoder.layer_norm_hidden_state)

    return {name: taken(encoder) for name, encoder in encoders(clip).items()}


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
            return token.detach()  # A1111 saves what it trained with its gradient switched on
        return table(torch.tensor([token], device=table.weight.device), out_dtype=torch.float32)

    vectors = [vector(token).reshape(1, -1).cpu() for token in words]
    return torch.cat(vectors) if vectors else torch.zeros(0, table.embedding_dim)
