"""The concept file: a word and its edit as fp16 tensors with string metadata, 30 KB for SD1.x.

Its tensors are the word's vectors for each text encoder, `word.clip_l`; `inputs`, whose rows are i* and the
super-category's; and end to end in one tensor, so that a header of a hundred bytes for each layer is saved, the
`values` of the layers in `concepts.layers`, and where keys were trained their `keys`, of the same layers unless
`concepts.key_layers` names others. Where captions of the user's own made the metric there is `dual`, in fp32.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ..textual_inversion.concept import Concept, Word
from ..textual_inversion.file import LONGEST, placeholder_in
from ..textual_inversion.formats import ENCODERS
from ..training.contents import half_precision, parsed, require_format, single_precision, with_metadata
from ..training.disk import read_whole
from ..training.names import write_named
from .concept import Edit

FORMAT = 1
ENDING = ".safetensors"
LARGEST = 8 * 2**20  # bytes; a concept for SDXL with trained keys and a cover takes half a million
MOST_LAYERS = 1000
LONGEST_ENTRY = 200  # characters for one layer in the list of layers
NAME = re.compile(rf"word\.({'|'.join(ENCODERS)})|inputs|values|keys|dual")
LAYER = re.compile(r"\w+(\.\w+)*", re.ASCII)
IN_TRANSFORMER = re.compile(r"(?P<top>\w+)(?P<rest>(\.\w+)*)\.transformer_blocks\.(?P<number>[0-9]{1,4})", re.ASCII)
ENTRY = re.compile(r"(?P<top>\w+)?(?P<rest>(\.\w+)*)(/(?P<number>[0-9]{1,4}))?(:(?P<size>[1-9][0-9]{0,5}))?", re.ASCII)


def to_bytes(concept: Concept) -> bytes:
    """The file of a concept with one word and an edit; equal concepts give equal bytes.

    Raises ValueError for another kind of concept, or for numbers that half precision cannot hold.
    """
    if len(concept.words) != 1 or concept.edit is None:
        raise ValueError(f"A concept file holds one word and its edit; this concept has {len(concept.words)} words and "
                         f"{'no' if concept.edit is None else 'an'} edit.")
    (word,) = concept.words
    edit: Edit = concept.edit
    _check_writable(word.placeholder, edit)
    tensors = {f"word.{encoder}": vectors for encoder, vectors in word.vectors.items()}
    tensors["inputs"] = torch.stack([edit.target_input, edit.super_input])
    tensors |= {kind: torch.cat(list(vectors.values()))
                for kind, vectors in (("values", edit.values), ("keys", edit.keys)) if vectors}
    layers, key_layers = (layers_text({layer: len(vector) for layer, vector in vectors.items()})
                          for vectors in (edit.values, edit.keys))
    tensors = half_precision(word.placeholder, tensors)
    if edit.dual is not None:
        tensors["dual"] = edit.dual.detach().cpu().float().contiguous()
    data = with_metadata(
        safetensors.torch.save(tensors),
        {
            **{key: text for key, text in concept.metadata.items() if key != "concepts.key_layers"},
            "concepts.layers": layers,
            **({"concepts.key_layers": key_layers} if key_layers not in ("", layers) else {}),
            "concepts.format": str(FORMAT),
            "concepts.method": "perfusion",
            "concepts.placeholder": word.placeholder,
            "concepts.class_word": word.class_word,
            "concepts.presence": f"{edit.presence:.4f}",
            "concepts.encoder": edit.encoder,
            "trained_words": json.dumps([word.placeholder]),
        },
    )
    from_bytes(data, word.placeholder)  # what could not be read again is not written
    return data


def save(concept: Concept, folder: Path, name: str, overwrite: bool = False) -> Path:
    """Writes `folder/name.safetensors` as `write_named` does."""
    return write_named(to_bytes(concept), folder, name, ENDING, overwrite)


def load(path: Path, placeholder: str = "") -> Concept:
    """Reads a concept; `placeholder` replaces the one in the file. Raises ValueError that says what is wrong."""
    return from_bytes(read_whole(path, LARGEST, "a concept"), path.name, placeholder)


def from_bytes(data: bytes, name: str, placeholder: str = "") -> Concept:
    """Reads a concept out of the bytes of its file; `name` is what errors call it.

    Raises ValueError with one sentence unless every name, shape, type and number is what a concept has.
    """
    metadata, tensors = parsed(data, name)
    _check_header(name, metadata)
    vectors = {key: _checked(name, key, tensor) for key, tensor in tensors.items()}
    for key in ("inputs", "values", *(["keys"] if "concepts.key_layers" in metadata else [])):
        if key not in vectors:
            raise ValueError(f"{name} is damaged: it lacks the tensor {key!r}.")
    word = {key.removeprefix("word."): tensor for key, tensor in vectors.items() if key.startswith("word.")}
    target, super_input = _split(vectors["inputs"].flatten(), [vectors["inputs"].shape[1]] * 2)
    values = _by_layer(name, metadata, vectors, "values", "concepts.layers")
    named = "concepts.key_layers" if "concepts.key_layers" in metadata else "concepts.layers"
    keys = _by_layer(name, metadata, vectors, "keys", named) if "keys" in vectors else {}
    dual = vectors.get("dual")
    _check_together(name, target, word, values, keys, dual)
    presence, encoder = _presence(name, metadata), metadata.get("concepts.encoder", "")
    edit = Edit(target, super_input, values, keys, presence, encoder, dual)
    written = placeholder_in(name, metadata, placeholder)
    return Concept((Word(written, metadata.get("concepts.class_word", ""), word),), edit, metadata)


def check_fits(concept: Concept, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Raises ValueError unless the edit has what every layer of a model needs; `sizes` are in and out by layer."""
    edit: Edit = concept.edit
    (word,) = concept.words
    base = concept.metadata.get("modelspec.base_model", "another base")
    said = f"{word.placeholder} was learned on {base}; this model"
    for layer in edit.values:
        if layer not in sizes:
            raise ValueError(f"{said} has no layer {layer}: load a checkpoint of that base.")
    for layer, (taken, given) in sizes.items():
        if layer not in edit.values:
            raise ValueError(f"{said} also has a layer {layer}: load a checkpoint of that base.")
        if len(edit.target_input) != taken or len(edit.values[layer]) != given:
            raise ValueError(f"{said} has {taken} × {given} numbers in {layer} where the concept has "
                             f"{len(edit.target_input)} × {len(edit.values[layer])}: load a checkpoint of that base.")


def check_encoder(concept: Concept, width: int) -> None:
    """Raises ValueError unless the edit was learned with a text encoder that gives `width` numbers for a token."""
    (word,) = concept.words
    learned = len(concept.edit.target_input)
    if learned != width:
        base = concept.metadata.get("modelspec.base_model", "another base")
        raise ValueError(f"{word.placeholder} was learned on {base} with a text encoder that gives {learned} numbers "
                         f"for a token; this CLIP gives {width}: connect the CLIP of that base.")


def layers_text(sizes: Mapping[str, int]) -> str:
    """Layers and their sizes in one line: `input_blocks.1.1/0:320 .2.1 .4.1:640 middle_block.1/0:1280`.

    A slash stands for `.transformer_blocks.`; any other layer's name is written whole. Names that start with a dot
    start as the one before, and end in its number unless they have their own. A size holds until the next one.
    """
    entries, before, size_before = [], ("", ""), 0
    for layer, size in sizes.items():
        if match := IN_TRANSFORMER.fullmatch(layer):
            top, rest, number = match["top"], match["rest"], match["number"]
            again = bool(rest) and top == before[0]
            entry = ("" if again else top) + rest + ("" if again and number == before[1] else f"/{number}")
            before = top, number
        else:
            entry, before = layer, ("", "")
        entries.append(entry if size == size_before else f"{entry}:{size}")
        size_before = size
    return " ".join(entries)


def layer_sizes(text: str) -> dict[str, int]:
    """The layers and sizes that `layers_text` wrote. Raises ValueError with half a sentence for any other text."""
    entries = text.split(" ")
    if len(entries) > MOST_LAYERS:
        raise ValueError(f"name {len(entries)} layers, more than {MOST_LAYERS}")
    sizes: dict[str, int] = {}
    before, size = ("", ""), 0
    for entry in entries:
        match = ENTRY.fullmatch(entry) if 0 < len(entry) <= LONGEST_ENTRY else None
        top, number = (match["top"] or before[0], match["number"] or "") if match else ("", "")
        if match and not match["top"]:
            number = number or before[1]
            top = top if match["rest"] else ""
        size = int(match["size"] or size) if match else 0
        if not match or not top or not size:
            raise ValueError(f"name {entry[:30]!r}, which is no layer with a size")
        layer = f"{top}{match['rest']}.transformer_blocks.{number}" if number else f"{top}{match['rest']}"
        if layer in sizes:
            raise ValueError(f"name {layer} twice")
        sizes[layer] = size
        before = (top, number) if number else ("", "")
    return sizes


def _by_layer(name: str, metadata: Mapping[str, str], vectors: Mapping[str, Tensor], kind: str,
              named: str) -> dict[str, Tensor]:
    """The tensor `kind` cut into the layers that the header's `named` lists."""
    try:
        sizes = layer_sizes(metadata.get(named, ""))
    except ValueError as error:
        raise ValueError(f"{name} is damaged: its {named} {error}.") from error
    total = sum(sizes.values())
    if total != len(vectors[kind]):
        raise ValueError(f"{name} is damaged: its {named} take {total} numbers and {kind!r} has {len(vectors[kind])}.")
    return dict(zip(sizes, _split(vectors[kind], list(sizes.values())), strict=True))


def _split(tensor: Tensor, sizes: list[int]) -> list[Tensor]:
    """Pieces of their own, also for training."""
    with torch.inference_mode(False):
        return [piece.clone() for piece in tensor.split(sizes)]


def _check_writable(placeholder: str, edit: Edit) -> None:
    """Raises ValueError for an edit whose tensors could not be put together so that they come apart again."""
    if edit.target_input.ndim != 1 or edit.target_input.shape != edit.super_input.shape:
        raise ValueError(f"{placeholder} is damaged: its target_input has the shape {tuple(edit.target_input.shape)}, "
                         f"its super_input {tuple(edit.super_input.shape)}.")
    for layer, vector in (*edit.values.items(), *edit.keys.items()):
        if not LAYER.fullmatch(layer) or vector.ndim != 1:
            raise ValueError(f"{placeholder} is damaged: its layer {layer[:80]!r} of the shape {tuple(vector.shape)} "
                             "has no place in a file.")


def _check_header(name: str, metadata: Mapping[str, str]) -> None:
    if metadata.get("concepts.method") != "perfusion":
        raise ValueError(f"{name} is not a Perfusion concept: its header names no such method. Learned words belong in "
                         "models/embeddings, LoRAs in models/loras.")
    require_format(name, metadata, FORMAT, "concept")


def _checked(name: str, key: str, tensor: Tensor) -> Tensor:
    """The tensor in single precision, if a concept may hold one of this name, type and shape."""
    if not NAME.fullmatch(key):
        raise ValueError(f"{name} is not a concept of format {FORMAT}: it holds a tensor {key[:80]!r}.")
    dimensions = 1 if key in ("values", "keys", "dual") else 2
    fits = tensor.ndim == dimensions and 0 not in tensor.shape and (key != "inputs" or len(tensor) == 2)
    if not fits:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{name} is damaged: {key!r} is {kind} of the shape {tuple(tensor.shape)}.")
    return single_precision(name, key, tensor)


def _check_together(name: str, target: Tensor, word: Mapping[str, Tensor], values: Mapping[str, Tensor],
                    keys: Mapping[str, Tensor], dual: Tensor | None) -> None:
    """Raises ValueError unless the tensors belong together."""
    if not word:
        raise ValueError(f"{name} is damaged: it holds no word.")
    if not bool(target.any()):
        raise ValueError(f"{name} is damaged: its target_input is zero, so no word could be told from it.")
    (count, *more) = {len(vectors) for vectors in word.values()}
    width = sum(vectors.shape[1] for vectors in word.values())
    if more or count > LONGEST or width != len(target):
        shapes = ", ".join(f"{encoder} {tuple(vectors.shape)}" for encoder, vectors in sorted(word.items()))
        raise ValueError(f"{name} is damaged: a word of the shape {shapes} does not go with {len(target)} numbers in "
                         "each of its inputs.")
    for layer, key in keys.items():
        if layer not in values or len(values[layer]) != len(key):
            raise ValueError(f"{name} is damaged: its keys of {layer} have no values of their size beside them.")
    if dual is not None and not (len(dual) == len(target) and dual @ target > 0):
        raise ValueError(f"{name} is damaged: its dual does not go with its target_input.")


def _presence(name: str, metadata: Mapping[str, str]) -> float:
    written = metadata.get("concepts.presence", "")
    if not re.fullmatch(r"-?[0-9]\.[0-9]{1,9}", written):
        raise ValueError(f"{name} is damaged: its presence is {written[:20]!r}, not a number such as 0.6.")
    return float(written)
