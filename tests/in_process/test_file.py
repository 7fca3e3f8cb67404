"""Embedding files: byte-equal round trips, readable by ComfyUI itself, and one sentence for every kind of damage."""

import json
import os
import struct
import warnings
import zipfile
from pathlib import Path

import comfy.sd1_clip
import pytest
import torch
from concepts_pack.textual_inversion.concept import Concept, Word
from concepts_pack.textual_inversion.file import LAYOUTS, bundle, load, save, to_bytes
from concepts_pack.training.names import checked_name
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

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


def test_a_name_means_one_file_whatever_its_ending(tmp_path):
    for layout, name in (("A1111 (.pt)", "mine.pt"), ("diffusers (.bin)", "mine_2.bin"),
                         ("diffusers", "mine_3.safetensors")):
        path = save(concept(), tmp_path, "mine", layout=layout)
        assert path.name == name and comfy.sd1_clip.load_embed(path.stem, str(tmp_path), 32, "clip_l") is not None
    assert save(concept(), tmp_path, "mine_3", overwrite=True).name == "mine_3.safetensors"
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="There is a mine.pt too, .* instead of mine.bin; remove it first"):
        save(concept(), tmp_path, "mine", overwrite=True, layout="diffusers (.bin)")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["", " ", "../up", "a/../b", "/etc/x", "a b", "a,b", "a:b", "<a>", "a\\b", ".x",
                                  "a\0b", "\x1b", "a\u200bb", "a\u202egnp"])
def test_names_that_prompts_could_not_use(name):
    with pytest.raises(ValueError, match="cannot name a file"):
        checked_name(name)


def test_a_perfusion_concept_among_words_is_told_where_it_belongs(tmp_path):
    tensors = {"inputs": torch.ones(2, 32), "values": torch.ones(64)}
    save_file(tensors, tmp_path / "x.safetensors", {"concepts.method": "perfusion"})
    with pytest.raises(ValueError, match="x.safetensors is not an embedding: it is more than a learned word"):
        load(tmp_path / "x.safetensors")


def test_names_longer_than_disks_take():
    assert checked_name("a" * 200 + "/" + "猫" * 66)
    for name, count in (("a" * 201, 201), ("cats/" + "猫" * 67, 67)):
        with pytest.raises(ValueError, match=f"The name has {count} characters; give it fewer"):
            checked_name(name)


@pytest.mark.parametrize("name", ["CON", "aux", "sub/nul", "Lpt9/cat", "com1.txt", "con.safetensors", "cat.", "cats./a",
                                  "nul.a.pt", "...", "COM¹"])
def test_names_that_windows_could_not_open(name):
    with pytest.raises(ValueError, match="Windows cannot open anything called|cannot name a file"):
        checked_name(name)


@pytest.mark.parametrize("name", ["cone", "com", "com10", "my.aux", "aux-cable", "people/conny", "v1.5", "猫_Größe"])
def test_names_that_only_look_like_those(name):
    assert checked_name(name) == name


def test_other_embeddings_load(tmp_path):
    save_file({"emb_params": torch.ones(768).half()}, tmp_path / "foreign.safetensors")
    word, = load(tmp_path / "foreign.safetensors").words
    assert word.placeholder == "<foreign>" and word.vectors["clip_l"].shape == (1, 768)
    assert word.vectors["clip_l"].dtype == torch.float32
    assert load(tmp_path / "foreign.safetensors", "<x>").words[0].placeholder == "<x>"


@pytest.mark.parametrize(("name", "placeholder"), [
    ("猫", "<猫>"), ("犬", "<犬>"), ("белый кот", "<белый-кот>"), ("e\u0301te\u0301", "<été>"),
    ("my cat (1)", "<my-cat-1->"),
])
def test_foreign_files_are_called_by_their_names(tmp_path, name, placeholder):
    save_file({"emb_params": torch.ones(1, 768)}, tmp_path / f"{name}.safetensors")
    assert load(tmp_path / f"{name}.safetensors").words[0].placeholder == placeholder


@pytest.mark.parametrize(("tensors", "complaint"), [
    ({"a": torch.ones(3), "b": torch.ones(3)}, "not an embedding: it holds 2 tensors"),
    ({"emb_params": torch.ones(1, 2, 3)}, r"shape \(1, 2, 3\)"),
    ({"emb_params": torch.ones(0, 3)}, r"shape \(0, 3\)"),
    ({"emb_params": torch.ones(200, 3)}, r"shape \(200, 3\)"),
    ({"emb_params": torch.ones(1, 3).long()}, "numbers of the kind torch.int64"),
    ({"emb_params": torch.ones(1, 2**16 + 1)}, r"shape \(1, 65537\)"),
    ({"emb_params": torch.tensor([[1.0, float("nan")]])}, "not finite"),
    ({"emb_params": torch.tensor([[1.0, float("inf")]])}, "not finite"),
    ({}, "holds no embedding"),
])
def test_what_is_not_an_embedding_is_named(tmp_path, tensors, complaint):
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=f"odd.safetensors .*{complaint}"):
        load(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("written", ["two words", "<mine", "a" * 99 + "!"])
def test_a_placeholder_that_no_prompt_could_use_is_told_with_its_file(tmp_path, written):
    save_file({"emb_params": torch.ones(1, 32)}, tmp_path / "odd.safetensors", {"concepts.placeholder": written})
    with pytest.raises(ValueError, match=f"^odd.safetensors is damaged: its placeholder is '{written[:80]}', which"):
        load(tmp_path / "odd.safetensors")
    assert load(tmp_path / "odd.safetensors", "<mine>").words[0].placeholder == "<mine>"


VECTORS = torch.randn(2, 768, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("placeholder", ["<mine>", "zwx", "zwx-cat", "猫"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_round_trips(tmp_path, layout, placeholder):
    path = save(concept(placeholder, clip_l=VECTORS), tmp_path, "mine", layout=layout)
    assert path.suffix == LAYOUTS[layout]
    word, = load(path).words
    assert torch.equal(word.vectors["clip_l"], VECTORS)
    assert word.placeholder == placeholder
    assert torch.equal(comfy.sd1_clip.load_embed("mine", str(tmp_path), 768, "clip_l"), VECTORS)


def ldm():
    """As the code of the paper saves it: torch.save of a ParameterDict and a tensor for the token."""
    parameters = torch.nn.ParameterDict({"*": torch.nn.Parameter(VECTORS)})
    return {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": parameters}


def old_ldm():
    """The same as torch before 1.12 left it: the tensors in the module's `_parameters`."""
    parameters = torch.nn.ParameterDict()
    parameters._parameters["*"] = torch.nn.Parameter(VECTORS)
    return {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": parameters}


@pytest.mark.parametrize(("content", "placeholder"), [
    ({"string_to_token": {"*": 265}, "string_to_param": {"*": VECTORS}, "name": "my cat", "step": 500,
      "sd_checkpoint": None, "sd_checkpoint_name": None}, "<my-cat>"),
    (ldm(), "<foreign>"),
    (old_ldm(), "<foreign>"),
    ({"<dog>": VECTORS}, "<dog>"),
    ({"<dog>": VECTORS[0]}, "<dog>"),
    ({"sks-cat": VECTORS}, "sks-cat"),
    ({"my cat": VECTORS}, "<foreign>"),
    ({"0": VECTORS}, "<foreign>"),
    ({"emb_params": VECTORS}, "<foreign>"),
    ({"string_to_token": {"zwx": 265}, "string_to_param": {"zwx": VECTORS}}, "zwx"),
], ids=["A1111", "LDM", "LDM of old", "diffusers", "diffusers, one vector", "diffusers without brackets",
        "no placeholder", "a number", "kohya", "LDM with a placeholder"])
@pytest.mark.parametrize("ending", [".pt", ".bin"])
def test_pickled_layouts_load(tmp_path, content, placeholder, ending):
    torch.save(content, tmp_path / f"foreign{ending}")
    word, = load(tmp_path / f"foreign{ending}").words
    vectors = word.vectors["clip_l"]
    assert word.placeholder == placeholder and torch.equal(vectors, VECTORS[:len(vectors)])


def test_what_was_saved_with_its_gradient_on_is_learned_from(tmp_path):
    """A1111 and LDM save the parameter that they trained."""
    trained = VECTORS.clone().requires_grad_()
    torch.save({"string_to_param": {"*": trained}, "name": "cat"}, tmp_path / "cat.pt")
    vectors = load(tmp_path / "cat.pt").words[0].vectors["clip_l"]
    assert vectors.is_leaf and not vectors.requires_grad
    torch.optim.AdamW([vectors.requires_grad_()])


def test_older_diffusers_names_of_both_encoders(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"text_encoders_0": torch.ones(1, 768), "text_encoders_1": torch.ones(1, 1280)}, path)
    assert load(path).words[0].vectors.keys() == {"clip_l", "clip_g"}


def test_what_other_trainers_keep_beside_a_word_is_left_out_and_said(tmp_path, caplog):
    """As OneTrainer does with what it learns behind the text encoders."""
    kept = {"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280), "clip_l_out": torch.ones(1, 768)}
    save_file(kept, tmp_path / "x.safetensors")
    assert load(tmp_path / "x.safetensors").words[0].vectors.keys() == {"clip_l", "clip_g"}
    assert "x.safetensors also holds clip_l_out, which is for no text encoder" in caplog.text


def test_words_bundled_in_a_lora(tmp_path):
    lora = {"lora_unet_x.lora_up.weight": torch.ones(2, 2), "lora_unet_x.lora_down.weight": torch.ones(2, 2)}
    words = {"bundle_emb.cat.string_to_param.*": VECTORS, "bundle_emb.dog.clip_l": VECTORS + 1,
             "bundle_emb.dog.clip_g": torch.ones(2, 1280)}
    save_file(lora | words, tmp_path / "lora.safetensors")
    cat, dog = load(tmp_path / "lora.safetensors").words
    assert (cat.placeholder, dog.placeholder) == ("<cat>", "<dog>")
    assert torch.equal(cat.vectors["clip_l"], VECTORS) and dog.vectors.keys() == {"clip_l", "clip_g"}
    save_file({"bundle_emb.my cat.clip_l": VECTORS}, tmp_path / "x.safetensors", {"trained_words": '["my cat"]'})
    assert load(tmp_path / "x.safetensors").words[0].placeholder == "<my-cat>"
    with pytest.raises(ValueError, match=r"holds 2 words \(<cat>, <dog>\); leave the placeholder empty"):
        load(tmp_path / "lora.safetensors", "<mine>")
    save_file({"<flora>": VECTORS}, tmp_path / "flora.safetensors")
    assert load(tmp_path / "flora.safetensors").words[0].placeholder == "<flora>"
    save_file(lora, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="lora.safetensors is a LoRA and holds no learned words; use Load LoRA"):
        load(tmp_path / "lora.safetensors")


@pytest.mark.parametrize("encoders", [("clip_l",), ("clip_l", "clip_g")])
def test_bundling_keeps_the_lora_and_adds_the_word(tmp_path, encoders):
    lora, vectors = {"x.lora_up.weight": torch.ones(2, 2)}, {name: VECTORS + i for i, name in enumerate(encoders)}
    save_file(lora, tmp_path / "lora.safetensors", {"ss_network_dim": "2"})
    path = bundle(concept(**vectors), tmp_path / "lora.safetensors", tmp_path, "both")
    assert path.name == "both.safetensors"
    assert torch.equal(load_file(path)["x.lora_up.weight"], lora["x.lora_up.weight"])
    word, = load(path).words
    assert word.placeholder == "<mine>" and word.vectors.keys() == set(encoders)
    assert all(torch.equal(word.vectors[name], vectors[name]) for name in encoders)
    assert json.loads(comfy.utils.safetensors_header(str(path)))["__metadata__"] == {
        "ss_network_dim": "2", "trained_words": '["<mine>"]'}
    with pytest.raises(ValueError, match="both.safetensors already holds a word called 'mine'"):
        bundle(concept(), path, tmp_path, "again")


def test_a_header_names_no_more_than_one_word(tmp_path):
    words = {"bundle_emb.cat.clip_l": VECTORS, "bundle_emb.dog.clip_l": VECTORS + 1}
    save_file(words, tmp_path / "x.safetensors", {"concepts.placeholder": "<cat>"})
    assert {word.placeholder for word in load(tmp_path / "x.safetensors").words} == {"<cat>", "<dog>"}


@pytest.mark.parametrize("said", ["[]", '["zwx cat", "<zwx>"]', "zwx cat, zwx", "{}", "[" * 10000])
def test_bundled_words_keep_their_spelling(tmp_path, said):
    save_file({"x.lora_up.weight": torch.ones(2, 2)}, tmp_path / "lora.safetensors", {"trained_words": said})
    once = bundle(concept("zwx"), tmp_path / "lora.safetensors", tmp_path, "once")
    twice = bundle(concept("<mine>"), once, tmp_path, "twice")
    assert {word.placeholder for word in load(twice).words} == {"zwx", "<mine>"}


def test_a_word_out_of_a_lora_leaves_the_header_of_the_lora_behind(tmp_path):
    of_the_lora = {"ss_network_module": "networks.lora", "modelspec.architecture": "stable-diffusion-v1/lora",
                   "ss_tag_frequency": "{}", "ssmd_cover_images": "[]", "trained_words": '["style"]'}
    save_file({"bundle_emb.cat.clip_l": VECTORS}, tmp_path / "lora.safetensors",
              {**of_the_lora, "modelspec.base_model": "SD15", "concepts.training": '{"steps": 3}'})
    path = save(load(tmp_path / "lora.safetensors"), tmp_path, "cat")
    metadata = json.loads(comfy.utils.safetensors_header(str(path)))["__metadata__"]
    assert metadata == {
        "modelspec.base_model": "SD15", "concepts.training": '{"steps": 3}', "concepts.format": "1",
        "concepts.placeholder": "<cat>", "concepts.class_word": "", "concepts.encoder": "clip_l",
        "trained_words": '["<cat>"]'}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells which files are mapped")
def test_a_lora_can_be_replaced_by_its_bundle(tmp_path, monkeypatch):
    """Windows refuses to replace a file while a tensor is mapped from it."""
    save_file({"x.lora_up.weight": torch.ones(400, 4)}, tmp_path / "lora.safetensors")
    mapped, replace = [], os.replace

    def watched(source, target):
        mapped.append(str(target) in Path("/proc/self/maps").read_text())
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    path = bundle(concept(), tmp_path / "lora.safetensors", tmp_path, "lora", overwrite=True)
    assert mapped == [False] and len(load(path).words) == 1


def test_two_encoders_do_not_fit_a_pickle():
    both = concept(clip_l=torch.ones(1, 768), clip_g=torch.ones(1, 1280))
    with pytest.raises(ValueError, match="no place for the vectors of clip_l and clip_g; choose ComfyUI"):
        to_bytes(both, "A1111 (.pt)")


class Evil:
    """A pickle that leaves a file behind when it is executed."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


@pytest.mark.parametrize("name", ["evil.pt", "evil.bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_never_executed(tmp_path, name, zipped):
    content = {"string_to_param": {"*": Evil(tmp_path / "trace")}}
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=f"{name} cannot be read without running code"):
        load(tmp_path / name)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("content", [[VECTORS], "text", {"a": {"b": VECTORS}}, {"a": "text"}, {}, {"a": None},
                                     {"string_to_param": {}}, {"string_to_param": "text"}])
def test_other_pickles_are_named(tmp_path, content):
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="odd.pt (is not an embedding|holds no embedding)"):
        load(tmp_path / "odd.pt")


def nested(*parts):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor(list(parts))


def with_odd_parameters():
    parameters = torch.nn.ParameterDict()
    parameters.__dict__["_parameters"] = 1
    return parameters


@pytest.mark.parametrize("content", [
    {265: VECTORS}, {torch.ones(1): VECTORS}, {("a",): VECTORS}, {"cat": VECTORS.to_sparse()},
    {"cat": VECTORS.to("meta")}, {"cat": nested(VECTORS, VECTORS[:1])},
    {"clip_l": nested(VECTORS)}, {"bundle_emb.cat.clip_l": VECTORS.to_sparse()},
    {"cat": torch.quantize_per_tensor(VECTORS, 0.1, 0, torch.qint8)}, {"string_to_param": with_odd_parameters()},
    {"string_to_param": {torch.ones(99): VECTORS, "b": VECTORS}},
], ids=["number", "tensor", "tuple", "sparse", "meta", "nested", "nested encoder", "sparse bundle", "quantised",
        "parameters", "tensors as names"])
@pytest.mark.filterwarnings("ignore")
def test_hostile_pickles_are_one_sentence(tmp_path, content):
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"^odd.pt (is not an embedding: [^\n]*\.|holds no embedding\.)$"):
        load(tmp_path / "odd.pt")


@pytest.mark.parametrize("more", [{"name": VECTORS}, {"name": 3, "concepts.placeholder": [1]},
                                  {"string_to_param": {265: VECTORS}}, {"string_to_param": {torch.ones(1): VECTORS}}])
def test_a_name_that_is_no_text_is_none(tmp_path, more):
    torch.save({"string_to_param": {"*": VECTORS}} | more, tmp_path / "odd.pt")
    assert load(tmp_path / "odd.pt").words[0].placeholder == "<odd>"


def test_what_unpacks_to_more_than_any_embedding_is_not_unpacked(tmp_path, monkeypatch):
    """Deflated, zeros take a thousandth."""
    torch.save({"<dog>": torch.zeros(75, 2**18)}, tmp_path / "large.pt")
    with zipfile.ZipFile(tmp_path / "large.pt") as large, \
            zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in large.infolist():
            bomb.writestr(entry.filename, large.read(entry))
    packed = (tmp_path / "bomb.pt").read_bytes()
    (tmp_path / "odd.pt").write_bytes(packed.replace(b"PK\x01\x02\x14\x03\x14", b"PK\x01\x02\x14\x03\xff"))
    assert len(packed) < 2**20
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was unpacked"))
    for name, complaint in (("bomb", "is not an embedding: it is 75 MB large"), ("odd", "is damaged or cut off")):
        with pytest.raises(ValueError, match=f"{name}.pt {complaint}"):
            load(tmp_path / f"{name}.pt")


@pytest.mark.parametrize("data", [b"", b"hello", b"i\xb1\x6a\x6a\x6a", b"\x80\x02", b"junk" * 99, b"PK\x03\x04", None])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_cut_off_pickle_is_not_told_in_the_words_of_torch(tmp_path, data, zipped):
    path = tmp_path / "half.pt"
    torch.save({"<dog>": VECTORS}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2] if data is None else data)
    with pytest.raises(ValueError) as error:
        load(path)
    assert str(error.value) == "half.pt is damaged or cut off; download it again."


def test_a_huge_pickle_is_not_even_opened(tmp_path):
    with (tmp_path / "model.pt").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(ValueError, match="is not an embedding: it is 1024 MB large"):
        load(tmp_path / "model.pt")


def loads_or_says_why_not(path):
    try:
        loaded = load(path)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert loaded.words[0].vectors


@settings(max_examples=200)
@given(st.data())
def test_damaged_pickles_never_crash(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    torch.save({"<dog>": VECTORS[:, :8].clone()}, path)
    good = path.read_bytes()
    place = data.draw(st.integers(0, len(good) - 1))
    cut, flipped = good[:place], good[:place] + b"\xff" + good[place + 1:]
    path.write_bytes(data.draw(st.sampled_from((cut, flipped))))
    loads_or_says_why_not(path)


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
    loads_or_says_why_not(path)


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
