"""Every widget reaches what it is for."""

from dataclasses import replace

import folder_paths
import pytest
import torch
from concepts_pack.host.cross_attention import KEY, edits_on, sizes
from concepts_pack.host.text import encode, ready, rows
from concepts_pack.nodes import pretrain_e4t, training_inputs
from concepts_pack.nodes.train_textual_inversion import PRESETS
from concepts_pack.perfusion.concept import Edit
from concepts_pack.perfusion.train import EditRecipe
from concepts_pack.textual_inversion.apply import apply_words
from concepts_pack.textual_inversion.concept import Concept, Word
from concepts_pack.textual_inversion.train import Keeping, Preview, Recipe
from concepts_pack.textual_inversion.word import row_size
from PIL import Image

from .conftest import WIDTH, Told, told
from .test_nodes import NODES, OWN, own, run

SETTINGS = {"bias": 1.1, "temperature": 0.2, "key_strength": 0.5, "start": 0.1, "end": 0.9, "everywhere": True}
PRETRAIN = {"class_word": "cat", "name": "", "steps": 2, "batch_size": 2, "seed": 5, "rate": 0.01, "regulariser": 0.02,
            "resolution": 64, "mirror": True}


def inputs_of(node, **given):
    """A training node's inputs as the executor hands them over, every one a list, with its own defaults."""
    shown = {widget.id: getattr(widget, "default", None) for widget in NODES[node].GET_SCHEMA().inputs}
    return {name: value if name == "preset" else [value] for name, value in (shown | given).items()
            if value is not None}


def perfusion(model):
    """A Perfusion concept for this model."""
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(out, generator=generator) for name, (_, out) in sizes(model).items()}
    vector = torch.randn(WIDTH, generator=generator)
    word = Word("<mine>", "cat", {"clip_l": torch.ones(1, WIDTH)})
    return Concept((word,), Edit(vector, vector, values, dual=vector), {"modelspec.base_model": "SD15"})


def test_the_widgets_reach_the_edit(model, clip):
    concept = perfusion(model)
    patched, _ = run("ConceptsApply", model=model, clip=clip, concept=concept, strength=0.7, **SETTINGS).result
    stacked, _, names = run("ConceptsApplyStack", model=model, clip=clip, strength=0.7, **SETTINGS,
                            concepts={"concept0": concept, "concept1": None}).result
    hooks, _ = run("ConceptsHook", model=model, clip=clip, concept=concept, strength=0.7, **SETTINGS).result
    given = [*edits_on(patched), *edits_on(stacked), *hooks.hooks[0].transformers_dict[KEY]]
    assert len(given) == 3 and names == "<mine>"
    for edit in given:
        assert {name: getattr(edit, name) for name in ("strength", *SETTINGS)} == {"strength": 0.7, **SETTINGS}


def test_every_widget_reaches_the_training(model, clip, vae, photos, monkeypatch):
    monkeypatch.setattr("concepts_pack.nodes.train_textual_inversion.learn_word", told)
    pace = {"steps": 6, "learning_rate": 0.5, "batch_size": 3, "accumulation": 2, "schedule": "linear", "warmup": 1,
            "optimiser": "SGD"}
    look = {"resolution": 128, "mirror": True, "crops": 3, "mask_floor": 0.3, "snr_cap": 5.0, "seed": 7}
    given = {**look, "vectors": 2, "keep_length": 0.2, "own_masks": False, "placeholder": " <two> ",
             "own_sentences": "one {}\n", "save_every": 3, "keep_states": 5, "resume": False, "save_memory": "on",
             "preview_every": 9, "preview_prompt": "two {}", "preview_cfg": 3.0, "preview_steps": 4, "init_text": "cat"}
    inputs = inputs_of("ConceptsTrainTextualInversion", model=model, clip=clip, vae=vae, images=photos, **given,
                       preset=own(**pace))
    with pytest.raises(Told) as heard:
        run("ConceptsTrainTextualInversion", **inputs)
    *_, recipe, view, keeping, recompute = heard.value.args
    assert recipe == Recipe("<two>", "cat", vectors=2, norm_pull=0.2, sentences=("one {}",), own_masks=False, **look,
                            **pace)
    assert (view, keeping, recompute) == (Preview(9, "two {}", 3.0, 4), Keeping(3, 5, False), True)


@pytest.mark.parametrize("preset", ["balanced", "quick", "thorough"])
def test_rates_of_presets_are_in_sizes_of_the_class_word(model, clip, vae, photos, monkeypatch, preset):
    monkeypatch.setattr("concepts_pack.nodes.train_textual_inversion.learn_word", told)
    with pytest.raises(Told) as heard:
        run("ConceptsTrainTextualInversion", **inputs_of(
            "ConceptsTrainTextualInversion", model=model, clip=clip, vae=vae, images=photos, init_text="cat",
            preset={"preset": [preset]}))
    recipe, chosen = heard.value.args[4], PRESETS[preset]
    assert (recipe.steps, recipe.batch_size) == (chosen["steps"], chosen["batch_size"])
    assert recipe.learning_rate == pytest.approx(chosen["rate"] * row_size(rows(clip, "cat")["clip_l"]))


def test_every_widget_reaches_a_perfusion_training(model, clip, vae, photos, monkeypatch):
    monkeypatch.setattr("concepts_pack.nodes.train_perfusion.learn_word", told)
    monkeypatch.setattr("concepts_pack.nodes.train_perfusion.precision", lambda clip, text: torch.eye(WIDTH))
    preset = next(i for i in NODES["ConceptsTrainPerfusion"].GET_SCHEMA().inputs if i.id == "preset")
    pace = {widget.id: widget.default for widget in preset.options[-1].inputs} | {"value_rate": 0.07}
    given = {"training_bias": 0.9, "training_temperature": 0.2, "momentum": 0.7, "train_keys": True, "own_masks": False}
    with pytest.raises(Told) as heard:
        run("ConceptsTrainPerfusion", **inputs_of(
            "ConceptsTrainPerfusion", model=model, clip=clip, vae=vae, images=photos, init_text="cat", **given,
            preset={"preset": [OWN], **{name: [value] for name, value in pace.items()}}))
    recipe = heard.value.args[4]
    assert recipe == EditRecipe("<mine>", "cat", seed=0, bias=0.9, temperature=0.2, momentum=0.7, train_keys=True,
                                own_masks=False, **pace)


@pytest.mark.parametrize("node", ["ConceptsTrainTextualInversion", "ConceptsTrainPerfusion", "ConceptsTuneE4T"])
def test_a_cancelled_training_is_not_taken_from_the_cache(node, monkeypatch):
    inputs = {"placeholder": ["<mine>"], "seed": [1]}
    monkeypatch.setattr(training_inputs, "_stopped", [])
    before = NODES[node].fingerprint_inputs(**inputs)
    training_inputs._stopped.append((training_inputs._place(NODES[node]), training_inputs._widgets(inputs)))
    assert NODES[node].fingerprint_inputs(**inputs) != before


@pytest.fixture
def things(tmp_path, monkeypatch):
    for kind in ("input", "output", "user"):
        monkeypatch.setattr(folder_paths, f"{kind}_directory", str(tmp_path / kind))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "e4t", ([str(tmp_path / "e4t")], {".safetensors"}))
    (tmp_path / "input" / "cats").mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (64, 64), (100 * number, 90, 200)).save(tmp_path / "input" / "cats" / f"{number}.png")
    return tmp_path


def test_every_widget_reaches_a_pretraining(model, clip, calm_vae, things, monkeypatch):
    read = []
    own_read = pretrain_e4t.read_samples
    monkeypatch.setattr(pretrain_e4t, "read_samples", lambda *given: read.append(given) or own_read(*given))
    monkeypatch.setattr(pretrain_e4t, "precision", lambda clip: torch.eye(WIDTH))
    monkeypatch.setattr(pretrain_e4t, "pretrain", lambda *given, **more: told(given, more))
    with pytest.raises(Told) as heard:
        run("ConceptsPretrainE4T", model=model, clip=clip, vae=calm_vae, folder="cats", **PRETRAIN)
    recipe = heard.value.args[0][3]
    assert (recipe.word, recipe.steps, recipe.batch_size, recipe.seed) == ("cat", 2, 2, 5)
    assert (recipe.rate, recipe.offset_rate, recipe.regulariser) == (0.01, 0.01, 0.02)
    ((_, _, side, shown, mirror, floor, seed, *_),) = read
    assert (side, shown, mirror, floor, seed) == (64, 64, True, 0.1, 5)


def test_accumulation_and_guidance_reach_a_pretraining(model, clip, calm_vae, things, monkeypatch):
    monkeypatch.setattr(pretrain_e4t, "precision", lambda clip: torch.eye(WIDTH))
    monkeypatch.setattr(pretrain_e4t, "pretrain", lambda *given, **more: told(more))
    with pytest.raises(Told) as heard:
        run("ConceptsPretrainE4T", model=model, clip=clip, vae=calm_vae, folder="cats", **PRETRAIN, accumulation=2,
            preview_cfg=3.5)
    assert heard.value.args[0]["accumulation"] == 2 and heard.value.args[0]["look"].cfg == 3.5


def test_the_picture_of_gates_is_that_of_its_bias(model, clip):
    word = Word("<mine>", "cat", {"clip_l": torch.ones(1, WIDTH)})
    target = encode(ready(apply_words(clip, Concept((word,)), 1.0)), "a <mine> cat")[0][0, 2].float()
    edit = replace(perfusion(model).edit, target_input=target, dual=target)
    made = Concept((word,), edit, {"modelspec.base_model": "SD15"})
    pictures = [run("ConceptsInspect", concept=made, clip=clip, prompt="a {} cat", bias=bias).result[1]
                for bias in (-1.0, 2.0)]
    assert not torch.equal(*(picture[:, 50:] for picture in pictures))  # below the title
