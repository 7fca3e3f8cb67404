"""Domain files: what is saved is what is loaded, and damage is one sentence."""

import json
from dataclasses import asdict, replace

import pytest
import safetensors.torch
import torch
from concepts_pack.e4t.domain import Domain, digest, from_bytes, load, save, to_bytes
from concepts_pack.e4t.encoder import Encoder, Shape
from concepts_pack.e4t.offsets import Offset
from concepts_pack.training.contents import parsed, with_metadata

LAYER = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
SHAPE = Shape((8, 16), 12, {"clip_l": 32}, {"input_blocks.1.1.transformer_blocks.0": 4}, side=32, width=16, code=8)


def domain():
    torch.manual_seed(0)
    encoder = Encoder(SHAPE)
    for parameter in encoder.parameters():
        parameter.data = torch.randn_like(parameter).half().float()
    offsets = {LAYER: Offset(torch.randn(8, 3).half().float(), torch.randn(3, 8).half().float())}
    return Domain("teddy", "SD15", encoder, offsets, 0.5, "model", "text", {"concepts.training": "{}"})


def changed(tensors=None, drop=(), **metadata):
    header, held = parsed(to_bytes(domain()), "it")
    held = {name: tensor for name, tensor in (held | (tensors or {})).items() if name not in drop}
    header = {**header, **{key.replace("__", "."): value for key, value in metadata.items()}}
    return with_metadata(safetensors.torch.save(held), header)


def test_what_is_saved_is_loaded(tmp_path):
    made = domain()
    read = load(save(made, tmp_path, "teddy"))
    assert (read.word, read.base, read.scale, read.model, read.text) == ("teddy", "SD15", 0.5, "model", "text")
    assert read.encoder.shape == SHAPE and read.metadata["concepts.training"] == "{}"
    for name, tensor in made.encoder.state_dict().items():
        assert torch.equal(tensor, read.encoder.state_dict()[name])
    assert torch.equal(read.offsets[LAYER].left, made.offsets[LAYER].left)
    assert to_bytes(read) == to_bytes(made)
    assert not any(parameter.requires_grad for parameter in read.encoder.parameters())


def test_a_domain_read_twice_is_one(tmp_path):
    """Or a cancelled tuning would not go on from its state, nor its factors meet theirs again."""
    made = domain()
    more = {LAYER.replace("1.1", f"{number}.1"): made.offsets[LAYER] for number in range(1, 9)}
    path = save(replace(made, offsets=more), tmp_path, "teddy")
    one, other = load(path), load(path)
    assert digest(one) == digest(other) and list(one.offsets) == list(other.offsets) == sorted(more)


def test_a_name_that_is_taken_gets_a_counter(tmp_path):
    paths = [save(domain(), tmp_path, "teddy") for _ in range(2)] + [save(domain(), tmp_path, "teddy", overwrite=True)]
    assert [path.name for path in paths] == ["teddy.safetensors", "teddy_2.safetensors", "teddy.safetensors"]


WRONG = {
    "names no such method": {"concepts__method": "perfusion"},
    "update ComfyUI-Concepts": {"concepts__format": "2"},
    "names no class word": {"concepts__class_word": " "},
    "e4t.scale": {"e4t__scale": "nan"},
    "no shape of an encoder": {"e4t__shape": json.dumps({"levels": [8], "unet": 1e9, "words": {}, "values": {}})},
    "e4t.shape is no shape": {"e4t__shape": "[" * 10000},
    "also holds a tensor": {"tensors": {"encoder.more": torch.zeros(1)}},
    "lacks the tensor": {"drop": ("encoder.unet.bias",)},
    "has the shape": {"tensors": {"encoder.unet.bias": torch.zeros(3)}},
    "not finite": {"tensors": {"encoder.unet.bias": torch.full((16,), float("inf"))}},
    "int64": {"tensors": {"encoder.unet.bias": torch.zeros(16, dtype=torch.long)}},
    "not whole": {"drop": (f"left.{LAYER}",)},
    "has the shapes": {"tensors": {f"left.{LAYER}": torch.zeros(8, 2)}},
    "it holds a tensor": {"tensors": {"other": torch.zeros(1)}},
}


@pytest.mark.parametrize("said", WRONG)
def test_damage_is_one_sentence(said):
    with pytest.raises(ValueError, match=said) as caught:
        from_bytes(changed(**WRONG[said]), "bad.safetensors")
    assert str(caught.value).startswith("bad.safetensors") and str(caught.value).count("\n") == 0


def test_shapes_that_would_take_all_memory_are_refused_first():
    shape = json.dumps({"levels": [65528] * 60, "unet": 60000, "words": {"clip_l": 60000}, "values": {"a": 60000},
                        "width": 60000})
    with pytest.raises(ValueError, match="damaged"):
        from_bytes(changed(e4t__shape=shape), "bad.safetensors")


def test_a_side_that_pictures_could_not_be_resized_to_is_refused():
    with pytest.raises(ValueError, match="no shape of an encoder"):
        from_bytes(changed(e4t__shape=json.dumps(asdict(SHAPE) | {"side": 65535})), "bad.safetensors")


def test_other_files_are_one_sentence(tmp_path):
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x04pickle")
    for name in ("pickle", "gone"):
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            load(tmp_path / f"{name}.safetensors")


def test_numbers_that_half_precision_cannot_hold_are_not_written(tmp_path):
    made = domain()
    made.encoder.unet.bias.data[0] = 1e6
    with pytest.raises(ValueError, match="not finite"):
        save(made, tmp_path, "teddy")
    assert not list(tmp_path.iterdir())


def test_domains_that_differ_in_anything_have_other_digests():
    made = domain()
    changes = {"word": "cat"}, {"scale": 0.25}, {"vision": "eye"}, {"offsets": {}}
    others = [replace(made, **change) for change in changes]
    assert len({digest(each) for each in (made, *others)}) == 5 and digest(domain()) == digest(made)
