"""A concept as a LoRA: the host's own loader takes it, and it does at the target what the edit does."""

import json
from dataclasses import replace

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import folder_paths
import pytest
import torch
from concepts_pack.host.copies import unload
from concepts_pack.host.cross_attention import cross_attentions, sizes
from concepts_pack.host.text import widths
from concepts_pack.microworld.host import CHECKPOINT
from concepts_pack.nodes.export_lora import ConceptsExportLora
from concepts_pack.perfusion import file as edit_file
from concepts_pack.perfusion.concept import Edit
from concepts_pack.perfusion.edit import dual_of
from concepts_pack.perfusion.linear import linear_dual
from concepts_pack.perfusion.lora import to_bytes, to_lora
from concepts_pack.textual_inversion import file as word_file
from concepts_pack.textual_inversion.concept import Concept, Word
from safetensors.torch import load_file

from .conftest import DEVICE, HEADS, UNET, WIDTH, fill, make_model, make_other_clip
from .test_edit import rank_one

ENCODERS = {"SD15": {"clip_l": WIDTH}, "SD20": {"clip_h": WIDTH}, "SDXL": {"clip_l": WIDTH, "clip_g": 48},
            "microworld": {"clip_l": 256}}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def made_for(model, keys=(), encoders=None):
    """A concept with random numbers for the layers of a model."""
    draw, layers = generator(4), sizes(model)
    width = next(iter(layers.values()))[0]
    words = encoders or {"clip_l": width}
    word = Word("<mine>", "cat", {name: torch.randn(1, size, generator=draw) for name, size in words.items()})
    values, learned = ({name: torch.randn(out, generator=draw) * 2 for name, (_, out) in layers.items()}
                       for _ in range(2))
    edit = Edit(torch.randn(width, generator=draw), torch.randn(width, generator=draw), values,
                {name: learned[name] for name in keys})
    return Concept((word,), edit, {"modelspec.base_model": "SD15", "ssmd_cover_images": '["aGk="]'})


def precision_of(width):
    root = torch.randn(width, width, generator=generator(5))
    return root @ root.T / width + torch.eye(width)


def loaded(model, lora):
    """A clone of `model` with a LoRA on it by the host's own way, its weights brought in."""
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    comfy.model_management.load_models_gpu([patched], force_full_load=True)
    return patched


def clean(model):
    unload(model.model)


@pytest.fixture(params=list(ENCODERS))
def base(request, model):
    """A model of each family, and the widths of its encoders' vectors."""
    with torch.inference_mode():
        if request.param == "microworld":
            found = comfy.sd.load_checkpoint_guess_config(str(CHECKPOINT), output_vae=False, output_clip=False)[0]
        else:
            found = model if request.param == "SD15" else make_model(family=request.param)
    yield found, ENCODERS[request.param]
    clean(found)


@torch.no_grad()
def test_the_stock_loader_makes_the_target_give_what_was_learned(base):
    model, encoders = base
    layers = list(cross_attentions(model.model.diffusion_model))
    made = made_for(model, layers[:1], encoders)
    edit, precision = made.edit, precision_of(len(made.edit.target_input))
    before = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    lora = to_lora(model, made, made.edit.dual_under(precision))
    attentions = cross_attentions(model.model.diffusion_model)
    dtype = next(attentions[layers[0]].to_k.parameters()).dtype
    probe = torch.stack([edit.target_input, edit.super_input]).to(model.model.get_dtype_inference())
    locked = {name: attention.to_k(probe)[1].float() for name, attention in attentions.items()}
    expected = {}
    for name, attention in attentions.items():
        weights = {layer: getattr(attention, layer).weight.float() for layer in ("to_k", "to_v")}
        outputs = {"to_k": edit.keys.get(name, locked[name]), "to_v": edit.values[name]}
        dual = dual_of(edit.target_input[None], precision)[0].float()
        expected |= {f"diffusion_model.{name}.attn2.{layer}.weight":
                     weights[layer] + rank_one(weights[layer], edit.target_input, outputs[layer], dual)
                     for layer in weights}
    patched = loaded(model, lora)
    assert patched.patches.keys() == expected.keys() and len(expected) == 2 * len(layers)
    close = {"rtol": 4e-3, "atol": 2e-2 if dtype == torch.float32 else 6e-2}
    for name, weight in patched.model.state_dict().items():
        if name in expected:
            torch.testing.assert_close(weight.float(), expected[name], **close)
        else:
            assert torch.equal(weight, before[name]), name
    for name, attention in cross_attentions(patched.model.diffusion_model).items():
        target = probe[:1]
        torch.testing.assert_close(attention.to_v(target)[0].float(), edit.values[name], **close)
        torch.testing.assert_close(attention.to_k(target)[0].float(), edit.keys.get(name, locked[name]), **close)
    clean(patched)
    assert all(torch.equal(weight, before[name]) for name, weight in model.model.state_dict().items())


@torch.no_grad()
def test_it_is_made_for_the_weights_with_the_loras_on_them(model):
    made, precision = made_for(model), precision_of(WIDTH)
    name = next(iter(sizes(model)))
    key = f"diffusion_model.{name}.attn2.to_v.weight"
    other = model.clone()
    other.add_patches({key: (torch.randn(model.model.state_dict()[key].shape, generator=generator(6)),)}, 0.5)
    dual = made.edit.dual_under(precision)
    plain, lora = to_lora(model, made, dual), to_lora(other, made, dual)
    different = [part for part in lora if not torch.equal(lora[part], plain[part])]
    assert len(different) == 1 and different[0].endswith("attn2_to_v.lora_up.weight")
    assert all(torch.equal(t, plain[part]) for part, t in to_lora(model, made, made.edit.dual_under(precision)).items())
    attention = cross_attentions(loaded(other, lora).model.diffusion_model)[name]
    torch.testing.assert_close(attention.to_v(made.edit.target_input[None])[0], made.edit.values[name], rtol=4e-3,
                               atol=2e-2)
    clean(model)


@pytest.mark.parametrize(("stored", "computed"), [
    (torch.float16, None), (torch.bfloat16, None), (torch.float16, torch.float32), (torch.float8_e4m3fn, torch.float32),
])
def test_weights_stored_in_few_bits(stored, computed):
    config = comfy.supported_models.SD15(UNET | {"dtype": stored})
    config.unet_config |= HEADS
    config.set_inference_dtype(stored, computed)
    with torch.inference_mode():
        unet = comfy.model_base.BaseModel(config, device=torch.device("cpu"))
        fill(unet, 1)
        unet.diffusion_model.to(stored)
    few = comfy.model_patcher.ModelPatcher(unet, DEVICE, torch.device("cpu"))
    made, precision = made_for(few), precision_of(WIDTH)
    lora = to_lora(few, made, made.edit.dual_under(precision))
    name, attention = next(iter(cross_attentions(unet.diffusion_model).items()))
    weight = attention.to_v.weight.float()
    expected = rank_one(weight, made.edit.target_input, made.edit.values[name],
                        dual_of(made.edit.target_input[None], precision)[0].float())
    (key,) = {part.rpartition(".lora_")[0] for part in lora if part.endswith("down_blocks_0_attentions_0_"
              "transformer_blocks_0_attn2_to_v.lora_up.weight")}
    up, down = lora[f"{key}.lora_up.weight"].float(), lora[f"{key}.lora_down.weight"].float()
    torch.testing.assert_close(up @ down, expected, rtol=2e-2, atol=2e-2)
    clean(few)


def test_the_host_loads_as_much_of_the_model_as_it_likes(model, monkeypatch):
    """Two vectors go through layers that cast their own weights, so nothing else need leave the card for it."""
    asked, load = [], comfy.model_management.load_models_gpu

    def watched(models, *args, **settings):
        asked.append((models, args, settings))
        return load(models, *args, **settings)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", watched)
    made = made_for(model)
    to_lora(model, made, made.edit.dual_under(precision_of(WIDTH)))
    assert asked == [([model], (), {})]


def test_strength_scales_the_change_and_nothing_else(model):
    made, precision = made_for(model), precision_of(WIDTH)
    dual = made.edit.dual_under(precision)
    whole, half = to_lora(model, made, dual), to_lora(model, made, dual, 0.5)
    for name, tensor in whole.items():
        scale = 0.5 if name.endswith("lora_up.weight") else 1.0
        torch.testing.assert_close(half[name].float(), tensor.float() * scale, rtol=1e-3, atol=1e-4)
    assert {t.dtype for name, t in whole.items() if "lora_" in name and not name.endswith("alpha")} == {torch.float16}


def test_the_scale_of_the_covariance_does_not_matter(model):
    made, precision = made_for(model), precision_of(WIDTH)
    dual = made.edit.dual_under(precision)
    for name, tensor in to_lora(model, made, dual * 1e6).items():
        torch.testing.assert_close(tensor, to_lora(model, made, dual)[name], rtol=2e-3, atol=1e-4)


def test_names_are_those_of_kohya(model):
    made = made_for(model)
    names = [name for name in to_lora(model, made, made.edit.target_input) if not name.startswith("bundle")]
    assert names and all(name.startswith(("lora_unet_down_blocks_", "lora_unet_mid_block_", "lora_unet_up_blocks_"))
                         and "_attn2_to_" in name for name in names)


def test_numbers_that_half_precision_cannot_hold(model):
    with pytest.raises(ValueError, match="<mine> cannot become a LoRA: .*use a strength nearer 0") as error:
        to_lora(model, made_for(model), made_for(model).edit.target_input, 1e7)
    assert "\n" not in str(error.value)


@pytest.fixture
def loras(tmp_path, monkeypatch):
    """The LoRA folder, and a covariance that needs no measuring."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    folder_paths.filename_list_cache.pop("loras", None)
    monkeypatch.setattr("concepts_pack.perfusion.linear.precision",
                        lambda clip: precision_of(sum(widths(clip).values())))
    return tmp_path


@pytest.fixture(scope="session")
def pair():
    """The two text encoders of SDXL."""
    with torch.inference_mode():
        return make_other_clip("SDXL")


def export(model, clip, made, name="mine", strength=1.0, overwrite=False):
    return ConceptsExportLora.execute(model=model, clip=clip, concept=made, name=name, strength=strength,
                                      overwrite=overwrite)


def test_node_writes_what_loaders_list(model, clip, loras):
    made = made_for(model)
    output = export(model, clip, made)
    assert output.result == ("mine.safetensors",) and "mine.safetensors" in output.ui.as_dict()["text"][0]
    assert export(model, clip, made).result == ("mine_2.safetensors",)
    first, second = ((loras / name).read_bytes() for name in ("mine.safetensors", "mine_2.safetensors"))
    assert first == second == to_bytes(to_lora(model, made, linear_dual(clip, made)), made)
    assert export(model, clip, made, strength=0.5, overwrite=True).result == ("mine.safetensors",)
    assert (loras / "mine.safetensors").read_bytes() != first
    assert export(model, clip, made, name="people/anna").result == ("people/anna.safetensors",)
    metadata = json.loads(comfy.utils.safetensors_header(str(loras / "mine_2.safetensors")))["__metadata__"]
    assert json.loads(metadata["trained_words"]) == ["<mine>"] and json.loads(metadata["ssmd_cover_images"]) == ["aGk="]
    assert (metadata["modelspec.base_model"], metadata["ss_network_dim"]) == ("SD15", "1")


def test_for_diffusers_the_word_lies_beside(model, clip, loras, tmp_path, monkeypatch):
    """Which takes a file for a LoRA when every name in it says so."""
    words = [str(tmp_path / "words")], {".safetensors"}
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "embeddings", words)
    made = edit_file.from_bytes(edit_file.to_bytes(made_for(model)), "mine")  # with all that a file's header holds
    output = ConceptsExportLora.execute(model, clip, made, "mine", 1.0, False, bundle=False)
    names = load_file(loras / "mine.safetensors").keys()
    assert names and all("lora" in name for name in names)
    assert load_file(tmp_path / "words" / "mine.safetensors").keys() == {"<mine>"}  # which diffusers calls it by
    (word,), (own,) = word_file.load(tmp_path / "words" / "mine.safetensors").words, made.words
    assert word.placeholder == own.placeholder and all(map(torch.equal, word.vectors.values(), own.vectors.values()))
    assert "its word as mine.safetensors in models/embeddings" in output.ui.as_dict()["text"][0]


def test_node_hides_no_file_of_another_loras_folder(model, clip, loras, monkeypatch):
    second = loras / "second"
    second.mkdir()
    (second / "mine.safetensors").touch()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(loras), str(second)], {".safetensors"}))
    assert export(model, clip, made_for(model)).result == ("mine_2.safetensors",)


@pytest.mark.parametrize("family", ["SD15", "SDXL"])
def test_the_word_comes_along(model, clip, pair, loras, family):
    base, encoder = (model, clip) if family == "SD15" else (make_model(family=family), pair)
    made = made_for(base, encoders=ENCODERS[family])
    (name,) = export(base, encoder, made).result
    word, = word_file.load(loras / name).words
    assert word.placeholder == "<mine>"
    assert {n: v.shape for n, v in word.vectors.items()} == {n: v.shape for n, v in made.words[0].vectors.items()}
    assert all(torch.equal(v, made.words[0].vectors[n]) for n, v in word.vectors.items())


def test_the_word_keeps_its_spelling(model, clip, loras):
    made = made_for(model)
    export(model, clip, replace(made, words=(replace(made.words[0], placeholder="zwx"),)))
    assert word_file.load(loras / "mine.safetensors").words[0].placeholder == "zwx"


def test_node_says_what_does_not_go_together(model, clip, pair, loras):
    made = made_for(model)
    values = dict(made.edit.values)
    first = next(iter(values))
    for changed, encoder, complaint in (
        (replace(made, edit=None), clip, "only a word"),
        (replace(made, edit=replace(made.edit, values={n: v for n, v in values.items() if n != first})), clip,
         f"was learned on SD15; this model also has a layer {first}"),
        (made, pair, f"gives {WIDTH} numbers for a token; this CLIP gives {WIDTH + 48}"),
    ):
        with pytest.raises(ValueError, match=complaint) as error:
            export(model, encoder, changed)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="cannot name"):
        export(model, clip, made, name="../up")
    assert not list(loras.iterdir())
