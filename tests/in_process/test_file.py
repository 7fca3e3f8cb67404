"""Embedding files: byte-equal round trips, readable by ComfyUI itself, and one sentence for every kind of damage."""

import json
import os
import struct

import comfy.sd1_clip
import pytest
import torch
from concepts_pack.textual_inversion.concept import Concept, Word
from concepts_pack.textual_inversion.file import checked_name, load, save, to_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

METADATA = {"modelspec.base_model": "SD15", "ssmd_cover_images": '["aGk="]', "concepts.training": '{"steps": 3}'}


def concept(placeholder="<mine>", count=2, width=32, **encoders):
    vectors = encoders or {"clip_l": torch.randn(count, width, generator=torch.Generator().manual_seed(0))}
    return Concept((Word(placeholder, "cat", vectors),), metadata=METADATA)


def test_save_load_save_is_byte_equal(tmp_path):
    first = save(concept(), tmp_path, "a")
    second = save(load(first), tmp_path, "b")
    assert first.read_bytes() == second.read_bytes()
    word, = load(first).words
    assert (word.placeholder, word.class_word) == ("<mine>", "cat")
    assert torch.equal(word.vectors["clip_l"], concept().words[0].vectors["clip_l"])


def test_both_encoders_of_sdxl_round_trip(tmp_path):
    both = concept(clip_l=torch.randn(1, 768), clip_g=torch.randn(1, 1280))
    path = save(both, tmp_path, "both")
    assert load(path).words[0].vectors.keys() == {"clip_l", "clip_g"}
    assert to_bytes(load(path)) == path.read_bytes()


def test_host_reads_the_file(tmp_path):
    path = save(concept(), tmp_path, "mine")
    read = comfy.sd1_clip.load_embed("mine", str(tmp_path), 32, "clip_l")
    assert torch.equal(read, load(path).words[0].vectors["clip_l"])


def test_host_reads_the_metadata(tmp_path):
    header = comfy.utils.safetensors_header(str(save(concept(), tmp_path, "mine")))
    metadata = json.loads(header)["__metadata__"]
    assert json.loads(metadata["trained_words"]) == ["<mine>"]
    assert json.loads(metadata["ssmd_cover_images"]) == ["aGk="]
    assert metadata["modelspec.base_model"] == "SD15"


def test_taken_names_are_kept(tmp_path):
    names = [save(concept(), tmp_path, "people/anna").name for _ in range(3)]
    assert names == ["anna.safetensors", "anna_2.safetensors", "anna_3.safetensors"]
    before = (tmp_path / "people/anna.safetensors").read_bytes()
    assert save(concept("<other>"), tmp_path, "people/anna", overwrite=True).name == "anna.safetensors"
    assert (tmp_path / "people/anna.safetensors").read_bytes() != before
    assert sorted(p.name for p in (tmp_path / "people").iterdir()) == sorted(names)


@pytest.mark.parametrize("name", ["", " ", "../up", "a/../b", "/etc/x", "a b", "a,b", "a:b", "<a>", "a\\b", ".x"])
def test_names_that_prompts_could_not_use(name):
    with pytest.raises(ValueError, match="cannot name an embedding"):
        checked_name(name)


def test_other_embeddings_load(tmp_path):
    save_file({"whatever": torch.ones(768).half()}, tmp_path / "foreign.safetensors")
    word, = load(tmp_path / "foreign.safetensors").words
    assert word.placeholder == "<foreign>" and word.vectors["clip_l"].shape == (1, 768)
    assert word.vectors["clip_l"].dtype == torch.float32
    assert load(tmp_path / "foreign.safetensors", "<x>").words[0].placeholder == "<x>"


@pytest.mark.parametrize(("tensors", "complaint"), [
    ({"a": torch.ones(3), "b": torch.ones(3)}, "not an embedding: it holds 2 tensors"),
    ({"emb_params": torch.ones(1, 2, 3)}, r"shape \(1, 2, 3\)"),
    ({"emb_params": torch.ones(0, 3)}, r"shape \(0, 3\)"),
    ({"emb_params": torch.ones(200, 3)}, r"shape \(200, 3\)"),
    ({"emb_params": torch.ones(1, 3).long()}, "whole numbers"),
    ({"emb_params": torch.tensor([[1.0, float("nan")]])}, "not finite"),
    ({"emb_params": torch.tensor([[1.0, float("inf")]])}, "not finite"),
    ({}, "holds no embedding"),
])
def test_what_is_not_an_embedding_is_named(tmp_path, tensors, complaint):
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=f"odd.safetensors .*{complaint}"):
        load(tmp_path / "odd.safetensors")


@settings(max_examples=300)
@given(st.data())
def test_damaged_files_never_crash(tmp_path_factory, data):
    good = to_bytes(concept())
    place = data.draw(st.integers(0, len(good) - 1))
    damage = data.draw(st.sampled_from(("cut", "flip", "insert")))
    byte = data.draw(st.integers(0, 255))
    bad = {"cut": good[:place], "flip": good[:place] + bytes([byte]) + good[place + 1:],
           "insert": good[:place] + bytes([byte]) + good[place:]}[damage]
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(bad)
    try:
        loaded = load(path)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert loaded.words[0].vectors


def test_a_pickle_is_not_executed(tmp_path):
    (tmp_path / "evil.safetensors").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path).encode() + b"/ran'\ntR.")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load(tmp_path / "evil.safetensors")
    assert not (tmp_path / "ran").exists()


def test_header_is_aligned_and_sorted():
    data = to_bytes(concept())
    (size,) = struct.unpack("<Q", data[:8])
    metadata = json.loads(data[8:8 + size])["__metadata__"]
    assert size % 8 == 0 and list(metadata) == sorted(metadata)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_unwritable_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="could not be written: Permission denied"):
        save(concept(), tmp_path, "mine")


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "people").write_text("")
    with pytest.raises(ValueError, match="could not be written"):
        save(concept(), tmp_path, "people/anna")
