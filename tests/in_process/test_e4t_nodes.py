"""A tuned model and a domain's offsets on the nodes that all concepts share."""

from dataclasses import replace

import folder_paths
import pytest
import torch
from concepts_pack.e4t.difference import Difference, LowRank
from concepts_pack.e4t.domain import Domain
from concepts_pack.e4t.encoder import Encoder, Shape
from concepts_pack.e4t.offsets import RANK, Offset
from concepts_pack.host.text import fingerprint_of
from concepts_pack.host.weight_offsets import ALL_PARTS, matrix_shapes
from concepts_pack.nodes.tune_e4t import checked
from concepts_pack.textual_inversion.concept import Concept, Word
from PIL import Image

from .conftest import WIDTH
from .test_nodes import NODES, run


@pytest.fixture(autouse=True)
def concepts(tmp_path, monkeypatch):
    for kind in ("concepts", "embeddings"):
        folder = tmp_path / kind
        folder.mkdir()
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(folder)], {".safetensors"}))
        folder_paths.filename_list_cache.pop(kind, None)
    return tmp_path / "concepts"


def random_factors(shapes, kind, rank):
    generator = torch.Generator().manual_seed(0)
    return {layer: kind(0.1 * torch.randn(out, rank, generator=generator),
                        torch.randn(rank, given, generator=generator))
            for layer, (out, given) in shapes.items()}


@pytest.fixture
def tuned(model):
    word = Word("<mine>", "cat", {"clip_l": torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(1))})
    difference = Difference(random_factors(matrix_shapes(model), Offset, RANK),
                            random_factors(matrix_shapes(model, ALL_PARTS), LowRank, 2))
    return Concept((word,), difference, {"modelspec.base_model": "SD15"})


def test_a_tuned_model_is_saved_loaded_and_applied_like_any_concept(tuned, model, clip, concepts):
    (text,) = run("ConceptsSave", concept=tuned, name="mine", overwrite=False).result
    assert text == "<mine>" and (concepts / "mine.safetensors").is_file()
    loaded, placeholder = run("ConceptsLoad", name="concepts/mine.safetensors", placeholder="").result
    assert placeholder == "<mine>" and isinstance(loaded.edit, Difference)
    patched, taught = run("ConceptsApply", model=model, clip=clip, concept=loaded, strength=1.0, bias=0.7).result
    assert patched.patches and not model.patches and taught is not clip
    stacked, _, names = run("ConceptsApplyStack", model=model, clip=clip, concepts={"concept0": loaded},
                            strength=1.0).result
    assert stacked.patches.keys() == patched.patches.keys() and names == "<mine>"
    page, picture = run("ConceptsInspect", concept=loaded, clip=clip).result
    assert "<mine>" in page and picture.shape[::3] == (1, 3)


@pytest.mark.parametrize(("node", "given"), [
    ("ConceptsHook", {"strength": 1.0}), ("ConceptsInline", {"text": ""}),
    ("ConceptsExportLora", {"name": "mine", "strength": 1.0, "overwrite": False}),
])
def test_where_a_tuned_model_cannot_go_is_one_sentence(tuned, model, clip, node, given):
    inputs = {"model": model, "clip": clip, "concept": tuned, **given}
    wanted = {i.id for i in NODES[node].GET_SCHEMA().inputs}
    with pytest.raises(ValueError, match="<mine> is a tuned model .*use Apply Concept"):
        run(node, **{name: value for name, value in inputs.items() if name in wanted})


def test_damaged_files_are_one_sentence(tuned, concepts):
    run("ConceptsSave", concept=tuned, name="mine", overwrite=False)
    path = concepts / "mine.safetensors"
    data = path.read_bytes()
    for damaged in (data[:1000], data[:-10], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="mine.safetensors"):
            run("ConceptsLoad", name="concepts/mine.safetensors", placeholder="")


def test_offsets_of_a_domain_at_a_strength(model):
    domain = Domain("cat", "SD15", Encoder(Shape((8, 16), 4, {"clip_l": 4}, {"layer": 4}, side=32)),
                    random_factors(matrix_shapes(model), Offset, RANK))
    (patched,) = run("ConceptsApplyDomain", model=model, domain=domain, strength=0.5).result
    assert len(patched.patches) == len(domain.offsets) and not model.patches
    assert run("ConceptsApplyDomain", model=model, domain=domain, strength=0.0).result == (model,)


@pytest.mark.parametrize(("change", "told"), [
    ({"base": "SDXL"}, "The domain 'cat' was pretrained on SDXL and this checkpoint is SD15; load a domain for it"),
    ({"encoder": Encoder(Shape((8,), 8, {"clip_l": 7}, {}))}, "gives words of 7 \\(clip_l\\) numbers, and this CLIP"),
    ({"text": "another"}, "pretrained with another text encoder than this one; more steps may be needed"),
    ({}, ""),
])
def test_a_domain_for_other_models_is_told(model, clip, caplog, change, told):
    domain = Domain("cat", "SD15", Encoder(Shape((8,), 8, {"clip_l": WIDTH}, {})), {}, text=fingerprint_of(clip))
    domain = replace(domain, **change)
    if "text" in change or not change:
        assert checked(domain, model, clip) is domain
        assert (told in caplog.text) if told else not caplog.text
    else:
        with pytest.raises(ValueError, match=told):
            checked(domain, model, clip)


def test_pretraining_shows_what_it_drew_and_counts_what_it_left_out(model, clip, calm_vae, tmp_path, monkeypatch):
    for kind in ("input", "output", "user"):
        monkeypatch.setattr(folder_paths, f"{kind}_directory", str(tmp_path / kind))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "e4t", ([str(tmp_path / "e4t")], {".safetensors"}))
    pictures = tmp_path / "input" / "cats"
    pictures.mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (64, 64), (100 * number, 90, 200)).save(pictures / f"{number}.png")
    (pictures / "broken.png").write_bytes(b"no picture")
    made = run("ConceptsPretrainE4T", model=model, clip=clip, vae=calm_vae, folder="cats", class_word="cat", name="",
               steps=2, batch_size=2, seed=0, rate=1e-3, regulariser=1e-3, resolution=64, mirror=False, accumulation=2,
               preview_cfg=3.0)
    domain, drawn = made.result
    assert domain.word == "cat" and drawn.shape == (1, 128, 128, 3)
    assert "Pictures that could not be used and were left out: 1" in str(made.ui.as_dict())


def test_a_batch_that_cannot_be_shared_is_told_before_the_pictures_are_read(model, clip, vae):
    with pytest.raises(ValueError, match="A batch of 16 pictures cannot be cut evenly into 3 parts; choose"):
        run("ConceptsPretrainE4T", model=model, clip=clip, vae=vae, folder="no such folder", class_word="cat", name="",
            steps=2, batch_size=16, seed=0, rate=1e-3, regulariser=1e-3, resolution=64, mirror=False, accumulation=3)
