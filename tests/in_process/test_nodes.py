"""The nodes as an artist meets them: stable names, help everywhere, one sentence for what cannot work."""

import asyncio
import json
import os
from pathlib import Path

import comfy.model_management
import comfy.utils
import concepts_pack
import folder_paths
import pytest
import torch
from comfy_api.latest import io
from concepts_pack.host.folders import input_subfolders
from concepts_pack.nodes.train_perfusion import read_recipe
from concepts_pack.textual_inversion.concept import Concept, Word
from PIL import Image
from safetensors.torch import save_file

from .conftest import WIDTH

OWN = "own settings"
ROOT = Path(__file__).resolve().parents[2]
SNAPSHOT = Path(__file__).with_name("schema.json")
extension = asyncio.run(concepts_pack.comfy_entrypoint())
NODES = {node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())}


def flat(inputs):
    """All inputs, also those that a choice brings up; one that grows counts once."""
    return [inner for i in inputs for inner in ([i] if isinstance(i, io.Autogrow.Input) else i.get_all())]


def schema(node):
    """What saved workflows depend on: ids, order and types."""
    described = node.GET_SCHEMA()
    return {
        "inputs": [[i.id, i.get_io_type()] for i in flat(described.inputs)],
        "outputs": [[o.id, o.get_io_type()] for o in described.outputs],
    }


def run(node_id, **inputs):
    return NODES[node_id].execute(**inputs)


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    folder = tmp_path / "embeddings"
    folder.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "embeddings", ([str(folder)], {".safetensors"}))
    folder_paths.filename_list_cache.pop("embeddings", None)
    return folder


@pytest.fixture
def training(model, clip, vae, photos):
    """The training node's inputs as the executor hands them over: every one a list."""
    inputs = {"model": model, "clip": clip, "vae": vae, "images": photos, "init_text": "cat"}
    for widget in NODES["ConceptsTrainTextualInversion"].GET_SCHEMA().inputs:
        inputs.setdefault(widget.id, getattr(widget, "default", None))
    inputs |= {"preview_every": 0, "preview_steps": 1, "masks": None, "captions": None}
    return {name: [value] for name, value in inputs.items()} | {"preset": own(steps=2)}


def own(**changes):
    """The preset widget at 'own settings', with the numbers it shows."""
    preset = next(i for i in NODES["ConceptsTrainTextualInversion"].GET_SCHEMA().inputs if i.id == "preset")
    shown = {widget.id: widget.default for widget in preset.options[-1].inputs}
    return {name: [value] for name, value in {"preset": OWN, **shown, "batch_size": 1, **changes}.items()}


def test_schema_is_that_of_the_snapshot():
    """Saved workflows hold widget values by position: change an id, an order or a type and they break."""
    now = {name: schema(node) for name, node in NODES.items()}
    if "CONCEPTS_WRITE_SNAPSHOT" in os.environ:
        SNAPSHOT.write_text(json.dumps(now, indent=1) + "\n")
    assert now == json.loads(SNAPSHOT.read_text())


@pytest.mark.parametrize("node_id", NODES)
def test_everything_is_explained(node_id):
    described = NODES[node_id].GET_SCHEMA()
    assert node_id.startswith("Concepts") and described.category.startswith("concepts/")
    assert described.description and described.search_aliases and described.display_name
    for socket in [*flat(described.inputs), *described.outputs]:
        assert socket.tooltip and socket.tooltip.endswith("."), socket.id


@pytest.mark.parametrize("node_id", NODES)
def test_help_page_names_every_widget_and_output(node_id):
    page = (ROOT / concepts_pack.WEB_DIRECTORY / "docs" / f"{node_id}.md").read_text(encoding="utf-8")
    described = NODES[node_id].GET_SCHEMA()
    sockets = [*flat(described.inputs), *described.outputs]
    assert not [s.id for s in sockets if f"**{(s.display_name or s.id)}**" not in page]
    for picture in [part.split(")")[0] for part in page.split("](")[1:]]:
        assert picture.startswith("http") or (ROOT / "web" / "docs" / picture).exists()


def test_train_save_load_apply(training, clip, model, folders):
    concept, losses, sheet = run("ConceptsTrainTextualInversion", **training).result
    assert len(losses["loss"]) == 2 and sheet.shape[::3] == (1, 3) and 0 <= sheet.min() <= sheet.max() <= 1
    (text,) = run("ConceptsSave", concept=concept, name="mine", overwrite=False).result
    assert text == "embedding:mine" and (folders / "mine.safetensors").exists()
    (text,) = run("ConceptsSave", concept=concept, name="people/anna", overwrite=False).result
    assert text == "embedding:people/anna"
    loaded, placeholder = run("ConceptsLoad", name="mine.safetensors", placeholder="").result
    assert placeholder == "<mine>"
    same_model, applied = run("ConceptsApply", model=model, clip=clip, concept=loaded, strength=1.0).result
    assert same_model is model
    vectors = [t for t, _ in applied.tokenize("a <mine>")["l"][0] if torch.is_tensor(t)]
    assert torch.equal(torch.stack(vectors), concept.words[0].vectors["clip_l"])


@pytest.mark.parametrize(("kind", "least"), [("object", 1e-3), ("style", 0)])
def test_things_are_looked_for_in_photos_without_masks_and_styles_are_not(training, calm_vae, kind, least):
    given = training | {"vae": [calm_vae], "sentences": [kind]}
    one, other = (run("ConceptsTrainTextualInversion", **given | {"own_masks": [looks]}).result[0]
                  .words[0].vectors["clip_l"] for looks in (True, False))
    assert (one - other).abs().max() > least if least else torch.equal(one, other)


@pytest.mark.parametrize("node, later", [
    ("ConceptsTrainTextualInversion", {"own_masks"}), ("ConceptsPretrainE4T", {"accumulation", "preview_cfg"}),
])
def test_prompts_without_widgets_that_came_later_are_valid(node, later):
    assert later <= NODES[node].INPUT_TYPES()["optional"].keys()


def test_an_older_prompt_trains(training):
    older = {name: value for name, value in training.items() if name != "own_masks"}
    assert len(run("ConceptsTrainTextualInversion", **older).result[1]["loss"]) == 2


def test_a_file_written_anew_is_read_anew(training, folders):
    load = NODES["ConceptsLoad"]
    concept = run("ConceptsTrainTextualInversion", **training).result[0]
    run("ConceptsSave", concept=concept, name="mine", overwrite=True)
    before = load.fingerprint_inputs("mine.safetensors", "")
    assert before == load.fingerprint_inputs("mine.safetensors", "")
    os.utime(folders / "mine.safetensors", (1, 1))
    assert before != load.fingerprint_inputs("mine.safetensors", "")


def test_only_the_node_that_was_cancelled_runs_again(training):
    """Two of the same widgets, which are all that the host tells of a node before it runs."""
    node = NODES["ConceptsTrainTextualInversion"]
    first, second = (node.PREPARE_CLASS_CLONE({"hidden_inputs": {io.Hidden.unique_id: place}}) for place in "12")
    before = first.fingerprint_inputs(**training), second.fingerprint_inputs(**training)
    comfy.utils.set_progress_bar_global_hook(
        lambda value, total, *_, **__: comfy.model_management.interrupt_current_processing((value, total) == (1, 5)))
    inputs = training | {"preset": own(steps=5)}
    try:
        second.execute(**inputs)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
        comfy.model_management.interrupt_current_processing(False)
    assert first.fingerprint_inputs(**inputs) == before[0]
    assert second.fingerprint_inputs(**inputs) != before[1]


def test_words_travel_in_a_lora(training, folders, tmp_path, monkeypatch):
    loras = tmp_path / "loras"
    loras.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(loras)], {".safetensors"}))
    folder_paths.filename_list_cache.pop("loras", None)
    save_file({"x.lora_up.weight": torch.ones(2, 2)}, loras / "style.safetensors")
    concept = run("ConceptsTrainTextualInversion", **training).result[0]
    (name,) = run("ConceptsBundle", concept=concept, lora="style.safetensors", name="both", overwrite=False).result
    loaded, placeholder = run("ConceptsLoadLoraWords", name=name).result
    assert (name, placeholder) == ("both.safetensors", "<mine>")
    assert torch.equal(loaded.words[0].vectors["clip_l"], concept.words[0].vectors["clip_l"])
    assert NODES["ConceptsLoadLoraWords"].fingerprint_inputs(name)
    inputs = {"concept": [concept], "lora": "style.safetensors", "name": "both", "overwrite": False}
    before = NODES["ConceptsBundle"].fingerprint_inputs(**inputs)
    assert before == NODES["ConceptsBundle"].fingerprint_inputs(**inputs)
    os.utime(loras / "style.safetensors", (1, 1))
    assert before != NODES["ConceptsBundle"].fingerprint_inputs(**inputs)


def test_a_folder_is_loaded_for_training(training, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))
    (tmp_path / "cats").mkdir()
    for name, size in (("a.png", (64, 80)), ("b.png", (96, 64))):
        Image.new("RGB", size, (200, 30, 30)).save(tmp_path / "cats" / name)
    (tmp_path / "cats" / "b.txt").write_text("a {} on grass", "utf-8")
    load = NODES["ConceptsLoadPhotos"]
    images, masks, captions = load.execute(folder="cats").result
    assert [tuple(i.shape) for i in images] == [(1, 80, 64, 3), (1, 64, 96, 3)] and captions == ["", "a {} on grass"]
    inputs = training | {"images": images, "masks": masks, "captions": captions}
    assert len(run("ConceptsTrainTextualInversion", **inputs).result[1]["loss"]) == 2
    before = load.fingerprint_inputs(folder="cats")
    (tmp_path / "cats" / "a.txt").write_text("another {}", "utf-8")
    assert load.fingerprint_inputs(folder="cats") != before
    for name in ("dogs", "../cats/..", "/"):
        with pytest.raises(ValueError, match="There is no folder"):
            load.execute(folder=name)


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_a_linked_folder_of_photos(tmp_path, monkeypatch):
    (tmp_path / "cats").mkdir()
    Image.new("RGB", (64, 80), (255, 0, 0)).save(tmp_path / "cats" / "a.png")
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "linked").symlink_to(tmp_path / "cats")
    assert input_subfolders() == ["linked"]
    assert NODES["ConceptsLoadPhotos"].execute(folder="linked").result[2] == [""]


def test_inspection_names_lengths_and_nearest_words(training, clip):
    concept = run("ConceptsTrainTextualInversion", **training).result[0]
    page, picture = run("ConceptsInspect", concept=concept, clip=clip).result
    assert picture.shape[::3] == (1, 3)  # there is something to preview
    assert page.startswith("learned word\n<mine>, learned from “cat”") and "clip_l: 1 × 32 numbers" in page
    assert "nearest cat " in page
    assert "steps_done: 2" in page and "base: SD15" in page


@pytest.mark.parametrize("record", ["[1]", "hello", "[" * 10000])
def test_a_damaged_record_of_the_training_does_not_keep_the_rest_from_inspection(clip, record):
    word = Word("<mine>", "cat", {"clip_l": torch.ones(1, 32)})
    page, _ = run("ConceptsInspect", concept=Concept((word,), metadata={"concepts.training": record}), clip=clip).result
    assert "clip_l: 1 × 32 numbers" in page and page.endswith("concepts.training in its file is damaged")


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match="There is no 'gone.safetensors' in models/embeddings"):
        run("ConceptsLoad", name="gone.safetensors", placeholder="")


def test_only_a_cancelled_training_is_trained_again(training):
    node = NODES["ConceptsTrainTextualInversion"]
    widgets = {name: value for name, value in training.items() if name not in ("model", "clip", "vae", "images")}
    before = node.fingerprint_inputs(**widgets)
    node.execute(**training)
    assert node.fingerprint_inputs(**widgets) == before
    comfy.utils.set_progress_bar_global_hook(
        lambda value, total, *_, **__: comfy.model_management.interrupt_current_processing(total == 40))
    try:
        stopped = node.execute(**(training | {"preset": own(steps=40)}))
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
        comfy.model_management.interrupt_current_processing(False)
    done = len(stopped.result[1]["loss"])
    (said,) = stopped.ui.as_dict()["text"]
    assert done < 40 and said.startswith(f"Training stopped after {done} of 40 steps; the word is kept in ")
    stopped = widgets | {"preset": own(steps=40)}
    assert node.fingerprint_inputs(**stopped) != before == node.fingerprint_inputs(**widgets)
    linked = {"init_text": (None,), "captions": (None,), "preset": own(steps=40) | {"learning_rate": (None,)}}
    assert node.fingerprint_inputs(**stopped | linked) == node.fingerprint_inputs(**stopped)
    assert node.fingerprint_inputs(**widgets | {"init_text": (None,)}) == before


@pytest.mark.parametrize(("widget", "value", "complaint"), [
    ("init_text", " ", "init text is empty"),
    ("init_text", "...", None),
    ("placeholder", "", "placeholder is empty"),
    ("placeholder", "my cat", "must be one word"),
    ("placeholder", "cat", "'cat' is a word the text encoder already knows; use one that is not, such as <cat>"),
    ("learning_rate", 0.0, "learning rate must be a number above 0"),
    ("learning_rate", float("nan"), "learning rate must be a number above 0"),
    ("learning_rate", float("inf"), "learning rate must be a number above 0"),
    ("own_sentences", "no place", "Each sentence needs the place"),
    ("clip", None, r"no text encoder \(CLIP\); load one and connect it to 'clip'"),
    ("vae", None, "no VAE"),
    ("images", torch.zeros(0, 64, 64, 3), "no images"),
    ("images", torch.zeros(1, 1, 1, 3), "1×1 pixels"),
    ("images", torch.full((1, 64, 64, 3), float("nan")), "Image 1 holds values that are not numbers"),
    ("masks", torch.ones(2, 64, 64), r"number of masks \(2\) is not that of the images \(3\); give one for each"),
    ("masks", torch.eye(64)[:32].expand(3, -1, -1), "Mask 1 is 64×32 pixels, image 1 64×64; they must be of one size"),
    ("masks", torch.full((3, 64, 64), float("nan")), "Mask 1 holds values that are not numbers"),
    ("captions", "a cat", r"number of captions \(1\) is not that of the images \(3\)"),
])
def test_what_cannot_be_trained_is_said_in_one_sentence(training, widget, value, complaint):
    inputs = training | ({"preset": own(learning_rate=value)} if widget == "learning_rate" else {widget: [value]})
    if complaint is None:
        run("ConceptsTrainTextualInversion", **inputs)
        return
    with pytest.raises(ValueError, match=complaint) as error:
        run("ConceptsTrainTextualInversion", **inputs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name, node in NODES.items() if "fingerprint_inputs" in vars(node)])
def test_a_node_whose_inputs_are_all_linked_has_a_fingerprint(name):
    """The host then gives None for each, and lists with it to nodes that take lists."""
    described = NODES[name].GET_SCHEMA()
    given = {i.id: (None,) if described.is_input_list else None for i in described.inputs
             if not isinstance(i, io.DynamicCombo.Input)}  # which cannot be linked
    first, again = (NODES[name].fingerprint_inputs(**given) for _ in range(2))
    assert first == again


def test_photos_of_the_sample_world():
    name = NODES["ConceptsMicroworldPhotos"].GET_SCHEMA().inputs[0].options[0]
    first = run("ConceptsMicroworldPhotos", concept=name, count=2, seed=1).result
    again = run("ConceptsMicroworldPhotos", concept=name, count=2, seed=1).result
    other = run("ConceptsMicroworldPhotos", concept=name, count=2, seed=2).result
    assert first[0].shape == (2, 128, 128, 3) and first[1].shape == (2, 128, 128) and first[2] in name
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])


@pytest.mark.parametrize("path", sorted((ROOT / "example_workflows").glob("*.json")), ids=lambda path: path.stem)
def test_example_workflow_fits_the_nodes(path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    links = {link[0]: link for link in workflow["links"]}
    for node in workflow["nodes"]:
        if node["type"] not in NODES:
            continue
        described = NODES[node["type"]].GET_SCHEMA()
        kinds = {i.id: i.get_io_type() for i in described.inputs}
        for slot in node["inputs"]:
            assert slot["type"] == kinds[slot["name"]]
            assert slot.get("link") is None or links[slot["link"]][5] == slot["type"]
        assert [o["type"] for o in node["outputs"]] == [o.get_io_type() for o in described.outputs]
    boxes = [(n["pos"], n["size"]) for n in workflow["nodes"]]
    for number, (pos, size) in enumerate(boxes):
        for other, other_size in boxes[number + 1:]:
            apart = [pos[i] + size[i] <= other[i] or other[i] + other_size[i] <= pos[i] for i in (0, 1)]
            assert any(apart), (pos, other)


def test_a_domain_that_was_pretrained_again_is_read_anew(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "e4t", ([str(tmp_path)], {".safetensors"}))
    (tmp_path / "cat.safetensors").touch()
    node = NODES["ConceptsLoadDomain"]
    before = node.fingerprint_inputs(name="cat.safetensors")
    assert node.fingerprint_inputs(name="cat.safetensors") == before
    os.utime(tmp_path / "cat.safetensors", (1, 1))
    assert node.fingerprint_inputs(name="cat.safetensors") != before


def test_a_lora_that_was_written_anew_is_read_anew(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    folder_paths.filename_list_cache.pop("loras", None)
    (tmp_path / "cat.safetensors").touch()
    node = NODES["ConceptsLoadLoraWords"]
    before = node.fingerprint_inputs(name="cat.safetensors")
    os.utime(tmp_path / "cat.safetensors", (1, 1))
    assert node.fingerprint_inputs(name="cat.safetensors") != before


def test_masks_of_a_folder_are_given_on(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))
    (tmp_path / "cats").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 48)).save(tmp_path / "cats" / name)
    Image.linear_gradient("L").resize((64, 48)).save(tmp_path / "cats" / "b.mask.png")
    output = NODES["ConceptsLoadPhotos"].execute(folder="cats")
    first, second = output.result[1]
    assert (first == 1).all() and second.shape == (1, 48, 64) and second[0, 0].max() < 0.1 < 0.9 < second[0, -1].min()
    assert output.ui.as_dict()["text"] == ("2 photos, 1 with a mask, 0 with a caption",)


def test_a_long_word_is_told(clip):
    for scale, share in ((1e3, "100%"), (1e-6, "0%")):
        word = Word("<mine>", "cat", {"clip_l": torch.full((1, WIDTH), scale)})
        page, _ = run("ConceptsInspect", concept=Concept((word,)), clip=clip).result
        assert f"{share} are shorter" in page


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_value_rate_that_cannot_be_is_one_sentence(rate):
    with pytest.raises(ValueError, match=r"^The value rate must be a number above 0, such as 0.03; it is .*\.$"):
        read_recipe({}, {"value_rate": rate})
