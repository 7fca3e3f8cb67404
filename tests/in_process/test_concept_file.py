"""Concept files: byte-equal round trips, the true sizes, and one sentence for every kind of damage."""

import copy
import itertools
import json
import os
import random
import re
import struct
from dataclasses import replace

import comfy.ops
import comfy.sd1_clip
import comfy.utils
import folder_paths
import pytest
import safetensors.torch
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from concepts_pack.e4t.difference import Difference
from concepts_pack.host import folders
from concepts_pack.host.cross_attention import cross_attentions
from concepts_pack.host.folders import unused_name
from concepts_pack.nodes.concept_files import ConceptsBundle, ConceptsLoad, ConceptsSave
from concepts_pack.perfusion.concept import Edit
from concepts_pack.perfusion.file import (
    LARGEST,
    MOST_LAYERS,
    check_fits,
    from_bytes,
    layer_sizes,
    layers_text,
    load,
    save,
    to_bytes,
)
from concepts_pack.perfusion.train import EditRecipe
from concepts_pack.textual_inversion import file as word_file
from concepts_pack.textual_inversion.concept import Concept, Word
from concepts_pack.textual_inversion.templates import BY_KIND
from concepts_pack.textual_inversion.train import record
from concepts_pack.training.contents import with_metadata
from concepts_pack.training.names import ENDINGS
from safetensors.torch import save_file

from .test_nodes import run

SD15 = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "transformer_depth_middle": 1,
    "context_dim": 768, "use_spatial_transformer": True, "use_linear_in_transformer": False, "legacy": False,
    "num_heads": 8, "adm_in_channels": None, "dtype": torch.float32,
}
SDXL = SD15 | {
    "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10, "context_dim": 2048,
    "num_classes": "sequential", "adm_in_channels": 2816, "use_linear_in_transformer": True, "num_heads": -1,
    "num_head_channels": 64,
}
LAYERS = {"input_blocks.1.1.transformer_blocks.0": 8, "middle_block.1.transformer_blocks.0": 16,
          "output_blocks.1.1.transformer_blocks.0": 16}
COVER = {"ssmd_cover_images": json.dumps(["aGk="])}


def concept(layers=LAYERS, keys=(), placeholder="<mine>", metadata=None, dual=None, **encoders):
    """A concept with random numbers; `encoders` are the width of each one's vectors."""
    draw = torch.Generator().manual_seed(0)
    widths = encoders or {"clip_l": 32}

    def vector(*shape):
        return torch.randn(*shape, generator=draw)

    word = Word(placeholder, "cat", {name: vector(2, width) for name, width in widths.items()})
    edit = Edit(vector(sum(widths.values())), vector(sum(widths.values())),
                {layer: vector(size) for layer, size in layers.items()},
                {layer: vector(layers[layer]) for layer in keys}, 0.61234, "0123456789abcdef", dual)
    return Concept((word,), edit, {"modelspec.base_model": "SD15", **COVER} if metadata is None else metadata)


def parts(data):
    """Metadata and tensors of a file."""
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8:8 + size])["__metadata__"], safetensors.torch.load(data)


def rewritten(metadata=None, tensors=None):
    """The bytes of a concept with some of its metadata and tensors replaced; None takes them out."""
    old, kept = parts(to_bytes(concept(keys=[next(iter(LAYERS))])))
    kept = {name: tensor for name, tensor in (kept | (tensors or {})).items() if tensor is not None}
    old = {name: text for name, text in (old | (metadata or {})).items() if text is not None}
    return with_metadata(safetensors.torch.save(kept), old)


def one_sentence(error):
    return "\n" not in str(error) and str(error).endswith(".") and len(str(error)) < 400


@pytest.mark.parametrize("keys", [(), tuple(LAYERS), tuple(LAYERS)[1:], tuple(LAYERS)[::-1]])
def test_save_load_save_is_byte_equal(tmp_path, keys):
    first = save(concept(keys=keys), tmp_path, "a")
    second = save(load(first), tmp_path, "b")
    assert first.read_bytes() == second.read_bytes() == to_bytes(concept(keys=keys))
    loaded, (word,) = load(first), load(first).words
    assert (word.placeholder, word.class_word) == ("<mine>", "cat")
    assert (loaded.edit.presence, loaded.edit.encoder) == (0.6123, "0123456789abcdef")
    assert list(loaded.edit.values) == list(LAYERS) and tuple(loaded.edit.keys) == keys
    made = concept(keys=keys)
    pairs = [(loaded.edit.target_input, made.edit.target_input), (loaded.edit.super_input, made.edit.super_input),
             (word.vectors["clip_l"], made.words[0].vectors["clip_l"]),
             *((loaded.edit.values[layer], made.edit.values[layer]) for layer in LAYERS),
             *((loaded.edit.keys[layer], made.edit.keys[layer]) for layer in keys)]
    assert all(read.dtype == torch.float32 and torch.equal(read, written.half().float()) for read, written in pairs)
    assert load(first, "<other>").words[0].placeholder == "<other>"


def test_a_metric_of_its_own_keeps_every_bit(tmp_path):
    """Half precision would move similarities, which decide where the edit acts."""
    target = concept().edit.target_input
    made = concept(dual=target * 1e5 + 1e-3)
    read = load(save(made, tmp_path, "a"))
    assert torch.equal(read.edit.dual, made.edit.dual) and to_bytes(read) == to_bytes(made)
    assert torch.equal(read.edit.dual_under(torch.eye(32)), made.edit.dual.double())
    assert load(save(concept(), tmp_path, "b")).edit.dual is None
    assert len(to_bytes(made)) - len(to_bytes(concept())) < 32 * 4 + 80


def test_what_is_loaded_is_its_own_and_can_be_trained(tmp_path):
    path = save(concept(), tmp_path, "a")
    with torch.inference_mode():
        loaded = load(path)
    path.write_bytes(b"")
    assert not loaded.edit.target_input.is_inference() and loaded.edit.target_input.isfinite().all()


def test_what_half_precision_cannot_hold_is_told_as_what_it_is(tmp_path):
    made = concept()
    grown = replace(made, words=(replace(made.words[0], vectors={"clip_l": torch.full((1, 32), 1e6)}),))
    with pytest.raises(ValueError, match="^<mine> has grown too large to be saved; train it again") as error:
        save(grown, tmp_path, "mine")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("made", [concept(), concept().words[0], concept().edit, Difference({})])
def test_deep_copies_share_what_was_learned(made):
    assert copy.deepcopy([made]) == [made]


def test_names_and_header(tmp_path):
    metadata, tensors = parts(to_bytes(concept(keys=[next(iter(LAYERS))], clip_l=32, clip_g=48)))
    assert tensors.keys() == {"word.clip_l", "word.clip_g", "inputs", "values", "keys"}
    assert metadata["concepts.layers"] == "input_blocks.1.1/0:8 middle_block.1/0:16 output_blocks.1.1/0"
    assert metadata["concepts.key_layers"] == "input_blocks.1.1/0:8"
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert list(metadata) == sorted(metadata)
    assert (metadata["concepts.format"], metadata["concepts.method"]) == ("1", "perfusion")
    read = json.loads(comfy.utils.safetensors_header(str(save(concept(), tmp_path, "a"))))["__metadata__"]
    assert json.loads(read["trained_words"]) == ["<mine>"] and json.loads(read["ssmd_cover_images"]) == ["aGk="]


def test_keys_of_the_same_layers_are_named_once():
    metadata, _ = parts(to_bytes(concept(keys=tuple(LAYERS), metadata={"concepts.key_layers": "old:3"})))
    assert "concepts.key_layers" not in metadata


@pytest.mark.parametrize(("sizes", "text"), [
    ({"a.1.transformer_blocks.0": 8, "a.2.transformer_blocks.0": 8, "a.2.transformer_blocks.1": 9,
      "b.1.transformer_blocks.1": 9}, "a.1/0:8 .2 .2/1:9 b.1/1"),
    ({"a.transformer_blocks.0": 8, "a.b.transformer_blocks.0": 8, "a.transformer_blocks.1": 8}, "a/0:8 .b a/1"),
    ({"a.1.transformer_blocks.0": 8, "a.2": 8, "a.3.transformer_blocks.0": 8, "transformer_blocks.0": 7},
     "a.1/0:8 a.2 a.3/0 transformer_blocks.0:7"),
    ({"a.transformer_blocks.0.transformer_blocks.00": 8, "a.transformer_blocks.0.b": 8, "a.transformer_blocks.x": 8},
     "a.transformer_blocks.0/00:8 a.transformer_blocks.0.b a.transformer_blocks.x"),
    ({"a.b.transformer_blocks.0": 8, "a.b.transformer_blocks.12345": 8, "a.c.transformer_blocks.0": 8},
     "a.b/0:8 a.b.transformer_blocks.12345 a.c/0"),
])
def test_layers_are_named_shortly_and_without_loss(sizes, text):
    assert layers_text(sizes) == text
    assert list(layer_sizes(text).items()) == list(sizes.items())


def test_any_layers_come_back():
    rng = random.Random(0)
    for _ in range(2000):
        pieces = [rng.choice(("a", "b", "0", "1", "transformer_blocks", "transformer_blocks.0")) for _ in range(60)]
        names = {".".join(pieces[start:start + rng.randint(1, 4)]) for start in range(0, 60, 4)}
        sizes = {name: rng.choice((8, 16)) for name in rng.sample(sorted(names), len(names))}
        assert list(layer_sizes(layers_text(sizes)).items()) == list(sizes.items())


def test_the_record_names_the_kind_of_sentences():
    recipe = EditRecipe("<mine>", "cat", steps=4, learning_rate=0.1, batch_size=2, seed=0, mirror=True)
    for kind, sentences in BY_KIND.items():
        assert json.loads(record(replace(recipe, sentences=sentences), 3, 64, 2))["sentences"] == kind
    read = json.loads(record(replace(recipe, sentences=("my {}",), vectors=2), 3, 64, 2))
    assert read == {
        "sentences": ["my {}"], "steps": 4, "learning_rate": 0.1, "batch_size": 2, "seed": 0, "mirror": True,
        "vectors": 2, "optimiser": "AdamW", "schedule": "cosine", "mask_floor": 0.1, "value_rate": 0.03,
        "momentum": 0.99, "constancy": 0.3, "bias": recipe.bias, "slide": 0.25, "temperature": recipe.temperature,
        "own_masks": True,
        "photos": 3, "side": 64, "steps_done": 2,
    }


@pytest.mark.parametrize(("config", "count", "encoders", "numbers", "largest"), [
    (SD15, 16, {"clip_l": 768}, 29_568, 30 * 1024),
    (SDXL, 70, {"clip_l": 768, "clip_g": 1280}, 178_688, 180 * 1024),
])
def test_size_on_the_true_layers(config, count, encoders, numbers, largest):
    """What is learned, and the whole file with the record of its training and without its cover."""
    unet = UNetModel(**config, device="meta", operations=comfy.ops.disable_weight_init)
    sizes = {name: (attention.to_v.in_features, attention.to_v.out_features)
             for name, attention in cross_attentions(unet).items()}
    recipe = EditRecipe("<mine>", "cat", steps=400, learning_rate=0.037623128347396851, batch_size=4, seed=2**53,
                        sentences=BY_KIND["object in places"], mask_floor=0.02, value_rate=0.3, relative_values=True,
                        momentum=0.9)
    made = concept({name: given for name, (_, given) in sizes.items()}, **encoders, metadata={
        "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": "SD15/perfusion",
        "modelspec.base_model": "SD15", "modelspec.title": "mine",
        "concepts.training": record(recipe, 5, 512, 400),
    })
    one = replace(made, words=(Word("<mine>", "cat", {name: v[:1] for name, v in made.words[0].vectors.items()}),))
    data = to_bytes(one)
    assert len(sizes) == count and {taken for taken, _ in sizes.values()} == {config["context_dim"]}
    assert sum(tensor.nbytes for tensor in parts(data)[1].values()) == numbers
    assert len(data) <= largest, len(data)
    check_fits(from_bytes(data, "file"), sizes)


def test_taken_names_are_kept(tmp_path):
    names = [save(concept(), tmp_path, "people/anna").name for _ in range(2)]
    assert names == ["anna.safetensors", "anna_2.safetensors"]
    before = (tmp_path / "people/anna.safetensors").read_bytes()
    save(concept(placeholder="<other>"), tmp_path, "people/anna", overwrite=True)
    assert (tmp_path / "people/anna.safetensors").read_bytes() != before
    with pytest.raises(ValueError, match="cannot name"):
        save(concept(), tmp_path, "../anna")


@pytest.mark.parametrize(("metadata", "complaint"), [
    ({"concepts.method": None}, "is not a Perfusion concept"),
    ({"concepts.method": "e4t"}, "is not a Perfusion concept"),
    ({"concepts.format": "2"}, "format '2' and this version of the pack reads 1; update ComfyUI-Concepts"),
    ({"concepts.format": "one"}, "format 'one' .*it is damaged"),
    ({"concepts.format": None}, "format '' .*it is damaged"),
    ({"concepts.placeholder": None}, "its placeholder is ''"),
    ({"concepts.placeholder": "a b"}, "its placeholder is 'a b'"),
    ({"concepts.presence": None}, "its presence is ''"),
    ({"concepts.presence": "nan"}, "its presence is 'nan'"),
    ({"concepts.presence": "1e9"}, "its presence is '1e9'"),
    ({"concepts.layers": None}, "its concepts.layers name '', which is no layer with a size"),
    ({"concepts.layers": "a"}, "its concepts.layers name 'a', which is no layer"),
    ({"concepts.layers": ".a:40"}, "its concepts.layers name '.a:40', which is no layer"),
    ({"concepts.layers": "a:8 .b:32"}, "its concepts.layers name '.b:32', which is no layer"),
    ({"concepts.layers": "a:0"}, "its concepts.layers name 'a:0', which is no layer"),
    ({"concepts.layers": "a/0:-8"}, "its concepts.layers name 'a/0:-8', which is no layer"),
    ({"concepts.layers": "a/0:8 /1:32"}, "its concepts.layers name '/1:32', which is no layer"),
    ({"concepts.layers": "a/0:8  b:32"}, "its concepts.layers name '', which is no layer"),
    ({"concepts.layers": "a\n:40"}, r"its concepts.layers name 'a\\n:40', which is no layer"),
    ({"concepts.layers": "a" * 300 + ":40"}, "its concepts.layers name 'a{30}', which is no layer"),
    ({"concepts.layers": "a.b/0:8 .b:32"}, r"its concepts.layers name a.b.transformer_blocks.0 twice"),
    ({"concepts.layers": "a:8 a.transformer_blocks.0 a/0"}, r"its concepts.layers name a.transformer_blocks.0 twice"),
    ({"concepts.layers": "a:41"}, "its concepts.layers take 41 numbers and 'values' has 40"),
    ({"concepts.layers": "a:999999"}, "its concepts.layers take 999999 numbers and 'values' has 40"),
    ({"concepts.layers": " ".join(["a:1"] * (MOST_LAYERS + 1))}, "name 1001 layers, more than 1000"),
    ({"concepts.key_layers": "input_blocks.1.1/0:9"}, "its concepts.key_layers take 9 numbers and 'keys' has 8"),
    ({"concepts.key_layers": "other:8"}, "its keys of other have no values of their size"),
    ({"concepts.key_layers": "middle_block.1/0:8"}, "keys of middle_block.1.transformer_blocks.0 have no values of"),
    ({"concepts.key_layers": None}, "its concepts.layers take 40 numbers and 'keys' has 8"),
])
def test_a_header_that_does_not_fit(metadata, complaint):
    with pytest.raises(ValueError, match=f"odd.safetensors .*{complaint}") as error:
        from_bytes(rewritten(metadata), "odd.safetensors")
    assert one_sentence(error.value)


LAYER = next(iter(LAYERS))


@pytest.mark.parametrize(("tensors", "complaint"), [
    ({"inputs": None}, "lacks the tensor 'inputs'"),
    ({"values": None}, "lacks the tensor 'values'"),
    ({"keys": None}, "lacks the tensor 'keys'"),
    ({"word.clip_l": None}, "holds no word"),
    ({"extra": torch.ones(3).half()}, "holds a tensor 'extra'"),
    ({"word.t5": torch.ones(1, 3).half()}, "holds a tensor 'word.t5'"),
    ({"values.a": torch.ones(3).half()}, "holds a tensor 'values.a'"),
    ({"values\n": torch.ones(3).half()}, r"holds a tensor 'values\\n'"),
    ({"inputs": torch.tensor([[0.0] * 32, [1.0] * 32]).half()}, "target_input is zero"),
    ({"inputs": torch.ones(32).half()}, r"'inputs' is float16 of the shape \(32,\)"),
    ({"inputs": torch.ones(1, 32).half()}, r"'inputs' is float16 of the shape \(1, 32\)"),
    ({"inputs": torch.ones(3, 32).half()}, r"'inputs' is float16 of the shape \(3, 32\)"),
    ({"inputs": torch.ones(2, 31).half()}, r"clip_l \(2, 32\) does not go with 31 numbers"),
    ({"inputs": torch.ones(2, 32).long()}, "'inputs' is int64"),
    ({"inputs": torch.ones(2, 32).double()}, "'inputs' is float64"),
    ({"inputs": torch.full((2, 32), float("nan"))}, "'inputs' holds values that are not finite"),
    ({"values": torch.full((40,), float("inf"))}, "'values' holds values that are not finite"),
    ({"values": torch.ones(0).half()}, r"'values' is float16 of the shape \(0,\)"),
    ({"values": torch.ones(1, 40).half()}, r"'values' is float16 of the shape \(1, 40\)"),
    ({"values": torch.ones(39).half()}, "its concepts.layers take 40 numbers and 'values' has 39"),
    ({"keys": torch.ones(16).half()}, "its concepts.key_layers take 8 numbers and 'keys' has 16"),
    ({"dual": torch.ones(31)}, "its dual does not go with its target_input"),
    ({"dual": torch.zeros(32)}, "its dual does not go with its target_input"),
    ({"dual": torch.ones(1, 32)}, r"'dual' is float32 of the shape \(1, 32\)"),
    ({"word.clip_l": torch.ones(32).half()}, r"'word.clip_l' is float16 of the shape \(32,\)"),
    ({"word.clip_l": torch.ones(1, 31).half()}, r"clip_l \(1, 31\) does not go with 32 numbers"),
    ({"word.clip_l": torch.ones(76, 32).half()}, r"clip_l \(76, 32\) does not go with"),
    ({"word.clip_l": torch.ones(1, 16).half(), "word.clip_g": torch.ones(2, 16).half()},
     r"clip_g \(2, 16\), clip_l \(1, 16\) does not go with"),
])
def test_tensors_that_do_not_fit(tensors, complaint):
    with pytest.raises(ValueError, match=f"odd.safetensors .*{complaint}") as error:
        from_bytes(rewritten(tensors=tensors), "odd.safetensors")
    assert one_sentence(error.value)


@pytest.mark.parametrize("pattern", [r'"inputs":\{.*?\}', r'"__metadata__":\{.*?\}'])
def test_a_name_twice(pattern):
    data = to_bytes(concept(metadata={}))
    (size,) = struct.unpack("<Q", data[:8])
    header = data[8:8 + size].decode().rstrip()
    header = f"{header[:-1]},{re.search(pattern, header)[0]}}}".encode()
    with pytest.raises(ValueError, match="twice.safetensors is not a readable") as error:
        from_bytes(struct.pack("<Q", len(header)) + header + data[8 + size:], "twice.safetensors")
    assert one_sentence(error.value)


@pytest.mark.parametrize("data", [b"", b"\0" * 7, b"\0" * 64, b"\xff" * 64, b"\x80\x04.", b"PK\3\4" * 20,
                                  struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 21) + b'{"__metadata__": null}',
                                  struct.pack("<Q", 200_000) + b"[" * 200_000])
def test_other_files(tmp_path, data):
    (tmp_path / "other.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="other.safetensors is not a") as error:
        load(tmp_path / "other.safetensors")
    assert one_sentence(error.value)


def test_files_that_are_words_gone_or_huge(tmp_path):
    word = word_file.save(Concept(concept().words), tmp_path, "word")
    with pytest.raises(ValueError, match="word.safetensors is not a Perfusion concept"):
        load(word)
    with pytest.raises(ValueError, match="gone.safetensors is not a readable .*No such file"):
        load(tmp_path / "gone.safetensors")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(LARGEST * 20)
    with pytest.raises(ValueError, match="model.safetensors is not a concept: it is 160 MB large"):
        load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("changed", [
    {"target_input": torch.full((32,), 1e6)}, {"target_input": torch.full((32,), 1e-12)},
    {"values": {LAYER: torch.full((8,), float("nan"))}}, {"presence": float("nan")},
    {"super_input": torch.ones(31)}, {"values": {}}, {"values": {"a b": torch.ones(8)}},
    {"values": {"a/0": torch.ones(8)}}, {"values": {LAYER: torch.ones(1, 8)}}, {"keys": {"other": torch.ones(8)}},
    {"dual": torch.zeros(32)},
])
def test_what_could_not_be_read_again_is_not_written(tmp_path, changed):
    made = concept()
    with pytest.raises(ValueError, match="<mine> (is damaged|has grown too large)") as error:
        save(replace(made, edit=replace(made.edit, **changed)), tmp_path, "a")
    assert one_sentence(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("other", [replace(concept(), edit=None), replace(concept(), words=concept().words * 2)])
def test_other_kinds_of_concepts(other):
    with pytest.raises(ValueError, match="A concept file holds one word and its edit"):
        to_bytes(other)


def damaged(rng, good):
    """Bytes of a file with one to three of the accidents that files and people have."""
    data = bytearray(good)
    for _ in range(rng.randint(1, 3)):
        head = 8 + struct.unpack("<Q", good[:8])[0]
        place = rng.randrange(rng.choice((8, head, max(len(data), 1)))) if data else 0
        accident = rng.randrange(6)
        if accident == 0:
            data[place:place + 1] = bytes([rng.randrange(256)])
        elif accident == 1:
            del data[place:]
        elif accident == 2:
            data[place:place] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 9)))
        elif accident == 3:
            del data[place:place + rng.randint(1, 40)]
        elif accident == 4:
            word = rng.choice((b"F16", b"F32", b"I64", b"BOOL", b"F8_E4M3", b"word", b"values", b"keys", b"[8]",
                               b"null", b"inputs", b"layers", b"/0", b":8", b" ", b".1", b"perfusion", b"<mine>",
                               b"0.6123", b'"1"', b"{", b"}"))
            other = rng.choice((b"F16", b"U16", b"BF16", b"F4", b"", b"values", b"[4,2]", b"[-1]", b"null", b"\\u0000",
                                b"1e999", b"[8]", b"{}", b"[]", b'"2"', b"\n", b":0", b" .1", b"/1"))
            data = data.replace(word, other, rng.choice((1, -1)))
        else:
            data[place:place + 9] = data[max(0, place - 50):max(0, place - 50) + rng.randint(1, 60)]
    return bytes(data)


def test_ten_thousand_damaged_files_load_or_say_why_not():
    rng, good, loaded = random.Random(0), to_bytes(concept(keys=[LAYER], metadata={})), 0
    for number in range(10_000):
        try:
            read = from_bytes(damaged(rng, good), "damaged.safetensors")
        except ValueError as error:
            assert one_sentence(error) and str(error).startswith("damaged.safetensors "), (number, error)
        else:
            loaded += 1
            assert to_bytes(read) and read.edit.target_input.any()
    assert 100 < loaded < 5000  # what only touched numbers or harmless text


def test_fits_its_base_and_no_other():
    made, sizes = concept(), {layer: (32, size) for layer, size in LAYERS.items()}
    check_fits(made, sizes)
    first, *rest = sizes
    for other, complaint in (
        ({layer: sizes[layer] for layer in rest}, f"this model has no layer {first}: load a checkpoint of that base"),
        (sizes | {"more": (32, 8)}, "this model also has a layer more: load a checkpoint of that base"),
        (sizes | {first: (32, 9)}, f"has 32 × 9 numbers in {first} where the concept has 32 × 8"),
        ({layer: (40, size) for layer, (_, size) in sizes.items()}, f"has 40 × 8 numbers in {first}"),
    ):
        with pytest.raises(ValueError, match=f"<mine> was learned on SD15; .*{complaint}") as error:
            check_fits(made, other)
        assert one_sentence(error.value)


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Empty folders for embeddings and concepts."""
    for kind in ("embeddings", "concepts"):
        (tmp_path / kind).mkdir()
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], {".safetensors"}))
        folder_paths.filename_list_cache.pop(kind, None)
    yield tmp_path
    for kind in ("embeddings", "concepts"):
        folder_paths.filename_list_cache.pop(kind, None)


def listed():
    for kind in ("embeddings", "concepts"):
        folder_paths.filename_list_cache.pop(kind, None)
    return next(widget.options for widget in ConceptsLoad.GET_SCHEMA().inputs if widget.id == "name")


def test_nodes_save_and_load_both_kinds(models):
    for made, text in ((concept(), "<mine>"), (Concept(concept().words), "embedding:mine")):
        output = ConceptsSave.execute(concept=made, name="mine", overwrite=False)
        assert output.result == (text,) and text in output.ui.as_dict()["text"][0]
    output = ConceptsSave.execute(concept=concept(), name="people/anna", overwrite=False)
    shown = output.ui.as_dict()["text"][0]
    assert "concepts/people/anna.safetensors in Load Concept" in shown and "Apply Concept" in shown
    assert listed() == ["mine.safetensors", "concepts/mine.safetensors", "concepts/people/anna.safetensors"]
    for name, has_edit in (("mine.safetensors", False), ("concepts/mine.safetensors", True),
                           ("concepts/people/anna.safetensors", True)):
        loaded, placeholder = ConceptsLoad.execute(name=name, placeholder="").result
        assert placeholder == "<mine>" and (loaded.edit is not None) == has_edit
        assert ConceptsLoad.fingerprint_inputs(name, "")
    assert ConceptsLoad.execute(name="concepts/mine.safetensors", placeholder=" <x> ").result[1] == "<x>"
    with pytest.raises(ValueError, match="no 'gone.safetensors' in models/concepts"):
        ConceptsLoad.execute(name="concepts/gone.safetensors", placeholder="")
    with pytest.raises(ValueError, match="layout 'diffusers' is for learned words, and <mine> is more than a word"):
        ConceptsSave.execute(concept=concept(), name="mine", overwrite=False, layout="diffusers")


def test_subfolders_are_listed_with_slashes_on_every_system(models, monkeypatch):
    path = models / "embeddings" / "people\\anna.safetensors"  # as Windows names a file in a subfolder
    path.parent.mkdir(exist_ok=True)
    path.touch()
    monkeypatch.setattr(os, "sep", "\\")
    assert listed() == ["people/anna.safetensors"]


@pytest.mark.parametrize("edit", [concept().edit, Difference({}, {})])
def test_what_is_more_than_a_word_is_not_saved_in_a_lora(models, edit):
    with pytest.raises(ValueError, match="<mine> is more than the word that fits into a LoRA; use Export Concept as"):
        ConceptsBundle.execute(concept=replace(concept(), edit=edit), lora="style.safetensors", name="x",
                               overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_saved_word_takes_no_entry_of_another_concept(models, overwrite):
    ConceptsSave.execute(concept=concept(placeholder="<edit>"), name="pb", overwrite=False)
    with pytest.raises(ValueError, match="as concepts/name, so a word cannot be called 'concepts/pb'"):
        ConceptsSave.execute(concept=Concept(concept().words), name=" concepts/pb", overwrite=overwrite)
    assert listed() == ["concepts/pb.safetensors"]
    assert ConceptsLoad.execute(name="concepts/pb.safetensors", placeholder="").result[1] == "<edit>"


def test_an_embedding_in_a_folder_called_concepts_keeps_its_name(models):
    """Workflows saved before there were concept files may name it."""
    word_file.save(Concept(concept(placeholder="<word>").words), models / "embeddings", "concepts/mine")
    listed()
    output = ConceptsSave.execute(concept=concept(placeholder="<edit>"), name="mine", overwrite=False)
    assert listed() == ["concepts/mine.safetensors", "concepts//mine.safetensors"]
    assert "choose concepts//mine.safetensors" in output.ui.as_dict()["text"][0]
    for name, placeholder in zip(listed(), ("<word>", "<edit>"), strict=True):
        assert ConceptsLoad.execute(name=name, placeholder="").result[1] == placeholder


def test_embedding_and_the_name_mean_the_file_just_saved(models, caplog, monkeypatch):
    """The host looks for a name in every subfolder, in no order."""
    def found(text):
        folders = [models / "embeddings", *(models / "embeddings").iterdir()]
        for order in itertools.permutations(str(folder) for folder in folders if folder.is_dir()):
            monkeypatch.setattr(comfy.sd1_clip, "expand_directory_list", lambda _, order=order: order)
            yield comfy.sd1_clip.load_embed(text.removeprefix("embedding:"), "", 32, "clip_l")[0, 0].item()

    def save(name, number, overwrite=False):
        made = Concept((Word("<mine>", "cat", {"clip_l": torch.full((1, 32), number)}),))
        text, = ConceptsSave.execute(concept=made, name=name, overwrite=overwrite).result
        return text

    texts = [save(name, float(number)) for number, name in enumerate(("people/anna", "old/anna", "anna", "old/ben"))]
    assert texts == [f"embedding:{name}" for name in ("people/anna", "old/anna_2", "anna_3", "old/ben")]
    assert [set(found(text)) for text in texts] == [{0}, {1}, {2}, {3}] and not caplog.messages
    assert save("old/ben", 4.0, overwrite=True) == "embedding:old/ben" and not caplog.messages
    assert save("ben", 5.0, overwrite=True) == "embedding:ben"
    assert f"ben and {models / 'embeddings' / 'old' / 'ben.safetensors'} answer to the same name" in caplog.messages[-1]


@pytest.mark.parametrize("kind", ["embeddings", "concepts", "loras"])
def test_a_file_of_another_models_folder_is_not_hidden(models, monkeypatch, caplog, kind):
    first, second = models / kind, models / "second"
    monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(first), str(second)], {".safetensors"}))
    for path in (first / "mine.pt", second / "mine_2.safetensors", second / "people" / "anna.safetensors"):
        path.parent.mkdir(exist_ok=True, parents=True)
        path.touch()
    assert [unused_name(kind, name, ENDINGS, False) for name in ("mine", "people/anna", "people/ben")] == [
        "mine_3", "people/anna_2", "people/ben"]
    assert not caplog.messages and unused_name(kind, "mine", ENDINGS, True) == "mine"
    assert not caplog.messages and unused_name(kind, "people/anna", ENDINGS, True) == "people/anna"
    assert f"{second / 'people' / 'anna.safetensors'} answer to the same name" in caplog.messages[0]


def test_the_nodes_hide_no_file_of_another_models_folder(models, monkeypatch):
    for kind in ("concepts", "loras"):
        first, second = models / kind, models / "second" / kind
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(first), str(second)], {".safetensors"}))
        second.mkdir(parents=True)
        (second / "mine.safetensors").touch()
    save_file({"x.lora_up.weight": torch.ones(2, 2)}, models / "second" / "loras" / "style.safetensors")
    ConceptsSave.execute(concept=concept(), name="mine", overwrite=False)
    ConceptsBundle.execute(concept=Concept(concept().words), lora="style.safetensors", name="mine", overwrite=False)
    assert [[path.name for path in (models / kind).iterdir()] for kind in ("concepts", "loras")] == [
        ["mine_2.safetensors"], ["mine_2.safetensors"]]


def test_the_folder_is_registered_once_and_behind_the_users_own(tmp_path, monkeypatch):
    own = str(tmp_path / "own")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "concepts", ([own], set()))
    folders.register()
    folders.register()
    paths, endings = folder_paths.folder_names_and_paths["concepts"]
    assert len(paths) == 2 and endings == {".safetensors"}
    assert folders.concepts_folder() == tmp_path / "own"


def test_layout_and_overwrite_reach_the_file(models):
    word = Concept(concept().words)
    assert run("ConceptsSave", concept=word, name="a", overwrite=False, layout="A1111 (.pt)").result == ("embedding:a",)
    assert (models / "embeddings" / "a.pt").is_file()
    for made in (word, concept()):
        for overwrite in (False, True, False):
            run("ConceptsSave", concept=made, name="b", overwrite=overwrite)
    for kind in ("embeddings", "concepts"):
        assert {path.name for path in (models / kind).iterdir()} >= {"b.safetensors", "b_2.safetensors"}
        assert not (models / kind / "b_3.safetensors").exists()


def test_a_bundle_replaces_only_where_asked(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    folder_paths.filename_list_cache.pop("loras", None)
    save_file({"x.lora_up.weight": torch.ones(2, 2)}, tmp_path / "style.safetensors")
    names = [run("ConceptsBundle", concept=Concept(concept().words), lora="style.safetensors", name="both",
                 overwrite=overwrite).result[0] for overwrite in (False, True, False)]
    assert names == ["both.safetensors", "both.safetensors", "both_2.safetensors"]
