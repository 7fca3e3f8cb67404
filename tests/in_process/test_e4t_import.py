"""A published release as a domain, at toy size on a UNet with SD1.x's blocks: the numbers are the published ones, from
picture to word and from offsets to weights, and what cannot be imported is one sentence."""

import copy
import json
import os
import re
from contextlib import contextmanager

import comfy.model_management
import comfy.utils
import folder_paths
import pytest
import torch
from concepts_pack.e4t import difference_file
from concepts_pack.e4t import domain as domain_file
from concepts_pack.e4t.domain import Domain
from concepts_pack.e4t.encoder import Encoder, Shape
from concepts_pack.e4t.import_release import domain_of, half_error, published_numbers
from concepts_pack.e4t.method import Predictor
from concepts_pack.e4t.release import MATRICES, read_release
from concepts_pack.e4t.tune import SHARE
from concepts_pack.e4t.tune_whole import whole_recipe
from concepts_pack.host.clip_vision import Vision, from_open_clip
from concepts_pack.host.copies import private_copies
from concepts_pack.host.lora_names import diffusers_names
from concepts_pack.host.pictures import to_latents
from concepts_pack.host.text import encode, rows
from concepts_pack.host.unet_features import unet_features
from concepts_pack.host.weight_offsets import ALL_PARTS, attention_matrices
from concepts_pack.training.dataset import gather, squares
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save

from .conftest import SD15_BLOCKS, VISION, WIDTH, make_clip_vision, make_model
from .test_clip_vision import PATCHES, open_clip, random_vision
from .test_e4t_release import (
    CONFIG,
    Evil,
    matrices,
    published_encoder,
    published_offset,
    random_encoder,
    random_offsets,
    write,
)
from .test_nodes import NODES, run

CHANNELS = {"down_blocks.0": 32, "down_blocks.1": 64, "down_blocks.2": 128, "mid_block": 128, "up_blocks.1": 128,
            "up_blocks.2": 64, "up_blocks.3": 32}
UNET = 32 * 4 + 64 * 3 + 128 * 5 + 128
OFFSETS = random_offsets(channels=CHANNELS, context=WIDTH)
VISION_WEIGHTS = random_vision()
FROZEN = CONFIG | {"unfreeze_clip_vision": False, "domain_class_token": "cat"}
TRAINED = CONFIG | {"unfreeze_clip_vision": True, "domain_class_token": "cat"}


def weights(**sizes):
    """encoder.pt at toy size with a whole CLIP vision in it."""
    own = random_encoder(**{"width": WIDTH, "unet": UNET, "word": WIDTH, "tokens": PATCHES} | sizes)
    own = {name: tensor for name, tensor in own.items() if not name.startswith("clip_vision.")}
    return own | {f"clip_vision.{name}": tensor for name, tensor in VISION_WEIGHTS.items()}


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
    """models/e4t with a release in it."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "e4t", ([str(tmp_path / "e4t")], {".safetensors"}))
    folder_paths.filename_list_cache.pop("e4t", None)
    (tmp_path / "e4t").mkdir()
    write(tmp_path / "e4t" / "cats", TRAINED, encoder=weights(), weight_offsets=OFFSETS)
    return tmp_path / "e4t"


@pytest.fixture(scope="module")
def whole_model():
    with torch.inference_mode():
        return make_model(changes=SD15_BLOCKS)


@pytest.fixture(scope="module")
def eye():
    with torch.inference_mode():
        return from_open_clip(VISION_WEIGHTS)


@pytest.fixture
def imported(models):
    with torch.inference_mode():
        return run("ConceptsImportE4T", folder="cats", name="").result[0]


def pictures(count=1, side=64):
    return torch.rand(count, side, side, 3, generator=torch.Generator().manual_seed(4))


def resized(pictures, side):
    """Bicubic with corners on corners, as kornia does it: Keys' kernel at a = -0.75, places clamped at the border."""
    def matrix(before):
        made = torch.zeros(side, before)
        for row in range(side):
            place = row * (before - 1) / (side - 1)
            for near in range(int(place) - 1, int(place) + 3):
                t = abs(place - near)
                inner, outer = (1.25 * t - 2.25) * t * t + 1, ((-0.75 * t + 3.75) * t - 6) * t + 3
                made[row, min(max(near, 0), before - 1)] += inner if t <= 1 else outer if t < 2 else 0
        return made

    return torch.einsum("ih,jw,bhwc->bijc", matrix(pictures.shape[1]), matrix(pictures.shape[2]), pictures)


def published_words(encoder, pictures, unet):
    """E(picture, UNet features) of e4t-diffusion, from the picture on; to grey levels, as the host sees pictures."""
    given = (resized(pictures, VISION["image_size"]) * 255).clamp(0, 255).round() / 255
    mean, std = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])
    states, norm = open_clip(VISION_WEIGHTS, ((given - mean) / std).permute(0, 3, 1, 2))
    pooled, tokens = norm(states[-1][:, 0]), states[-1][:, 1:]
    return published_encoder(encoder, pooled.expand(len(unet), -1), tokens.expand(len(unet), -1, -1), unet)


@contextmanager
def offset_as_published(unet):
    """The UNet that e4t-diffusion's encoder hears: the one with the offsets, which also denoises."""
    layers = {name: attention_matrices(unet)[MATRICES[name]] for name, _, _ in matrices(CHANNELS, WIDTH)}
    before = {name: layer.weight.data for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.weight.data = before[name] * (1 + published_offset(OFFSETS, name))
    yield
    for name, layer in layers.items():
        layer.weight.data = before[name]


def check_words(domain, whole_model, clip, tolerance):
    """v(x, t) of the predictor against the published formula."""
    generator = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=generator)
    timesteps = torch.tensor([30, 500, 980])
    with private_copies(whole_model, clip) as (unet, text), torch.no_grad():
        predictor = Predictor(unet, text, domain.word, domain.encoder, domain.offsets, domain.scale, torch.zeros(0, 0))
        plain = unet_features(unet.model, latents, noise, timesteps, *predictor.empty)
        with offset_as_published(unet.model.diffusion_model):
            features = unet_features(unet.model, latents, noise, timesteps, *predictor.empty)
        seen = domain.encoder.seen(pictures(), Vision(from_open_clip(VISION_WEIGHTS)))
        found = predictor.words(predictor.predict(seen, latents, noise, timesteps))["clip_l"][:, 0]
        class_word = rows(text, "cat")["clip_l"]
        predictor.installed.close()
    assert features.shape == (3, UNET) and seen.shape == (1, WIDTH)
    assert (features - plain).abs().max() > 0.01 * plain.abs().max()
    moved = 0.1 * published_words(weights(), pictures(), features)
    assert (found - class_word - moved).abs().max() < tolerance * moved.abs().max()
    assert (moved[0] - moved[2]).abs().max() > 10 * tolerance * moved.abs().max()  # it hears the timestep


def diffusers_unet(model):
    """The same UNet in diffusers, for which the release was written."""
    theirs = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64, 128, 128), attention_head_dim=4, cross_attention_dim=WIDTH).eval()
    own = model.model.diffusion_model.state_dict()
    sizes = {"num_res_blocks": [2] * 4, "transformer_depth_middle": 1,
             **{name: list(value) for name, value in SD15_BLOCKS.items()}}
    names = comfy.utils.unet_to_diffusers(sizes)
    theirs.load_state_dict({name: own[names[name]].clone() for name in theirs.state_dict()})
    return theirs


def test_unet_features_are_those_of_diffusers(whole_model, clip):
    """Spatial means of the 12 skip tensors and of the middle block, in this order, of the noised latent."""
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    timesteps, (empty, pooled) = torch.tensor([30, 500, 980]), encode(clip, "")
    theirs = diffusers_unet(whole_model)
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    with torch.no_grad():
        context, time = empty.expand(3, -1, -1), theirs.time_embedding(theirs.time_proj(timesteps))
        x = theirs.conv_in(schedule.add_noise(latents, noise, timesteps))
        skips = [x]
        for block in theirs.down_blocks:
            x, own = block(hidden_states=x, temb=time,
                           **({"encoder_hidden_states": context} if hasattr(block, "attentions") else {}))
            skips += own
        x = theirs.mid_block(x, time, encoder_hidden_states=context)
    expected = torch.cat([skip.mean((2, 3)) for skip in (*skips, x)], 1)
    assert expected.shape == (3, UNET) and len(skips) == 12
    torch.testing.assert_close(unet_features(whole_model.model, latents, noise, timesteps, empty, pooled), expected,
                               rtol=1e-3, atol=1e-3)


def test_words_are_the_published_ones(whole_model, clip, models, eye):
    check_words(domain_of(read_release(models / "cats"), Vision(eye)), whole_model, clip, 1e-4)


def test_words_of_the_saved_file_are_the_published_ones(whole_model, clip, imported):
    check_words(imported, whole_model, clip, 3e-3)


def test_offsets_on_a_model_are_the_published_ones(whole_model, imported):
    (patched,) = run("ConceptsApplyDomain", model=whole_model, domain=imported, strength=1.0).result
    before = {name: layer.weight.clone()
              for name, layer in attention_matrices(whole_model.model.diffusion_model).items()}
    assert len(patched.patches) == 96 == len(before)
    patched.patch_model()
    try:
        for name, _, _ in list(matrices(CHANNELS, WIDTH))[::7]:
            found = attention_matrices(patched.model.diffusion_model)[MATRICES[name]].weight
            expected = before[MATRICES[name]] * (1 + published_offset(OFFSETS, name))
            assert (found - expected).abs().max() < 3e-3 * expected.abs().max()
    finally:
        patched.unpatch_model()


def test_one_file_is_saved_and_loads_as_it_was(imported, models):
    loaded, word = run("ConceptsLoadDomain", name="cat.safetensors").result
    assert (word, loaded.base, loaded.scale, loaded.encoder.shape.words) == ("cat", "SD15", 0.1, {"clip_l": WIDTH})
    assert domain_file.to_bytes(loaded) == domain_file.to_bytes(imported) == (models / "cat.safetensors").read_bytes()
    own = sum(t.numel() for name, t in weights().items() if not name.startswith("clip_vision"))
    factors = sum(o.left.numel() + o.right.numel() for o in loaded.offsets.values())
    assert (models / "cat.safetensors").stat().st_size - 2 * (own + factors) < 60000  # names, and no CLIP vision
    record = json.loads(loaded.metadata["concepts.training"])
    assert record["base"] == "CompVis/stable-diffusion-v1-4" and record["source"] == "e4t-diffusion"


def test_the_report_tells_sizes_and_errors(models):
    _, _, said = run("ConceptsImportE4T", folder="cats", name="faces/mine").result
    release = read_release(models / "cats")
    assert (models / "faces" / "mine.safetensors").is_file() and "choose faces/mine.safetensors in Load" in said
    assert "cat: a domain learned on CompVis/stable-diffusion-v1-4; words at a scale of 0.1" in said
    assert f"{release.offset_error:.1e} of a matrix's" in said and f"{half_error(release.offsets):.1e}" in said
    assert f"sees with: {Vision(from_open_clip(VISION_WEIGHTS)).fingerprint}. It is not" in said
    numbers = sum(published_numbers(*offset) for offset in release.offsets.values())
    assert numbers == sum(tensor.numel() for tensor in OFFSETS.values())
    factors = sum(left.numel() + right.numel() for left, right in release.offsets.values())
    assert f"96 matrices: {4e-6 * numbers:.1f} MB became {4e-6 * factors:.1f} MB of rank 3" in said
    assert 1e-5 < half_error(release.offsets) < 1e-2


def tuned(model, clip, vae, domain, steps=0, **changes):
    given = {"model": model, "clip": clip, "vae": vae, "images": pictures(), "masks": None, "domain": domain}
    for widget in NODES["ConceptsTuneE4T"].GET_SCHEMA().inputs:
        given.setdefault(widget.id, getattr(widget, "default", None))
    given |= {"steps": steps, "preview_every": 0, "preview_steps": 1, **changes}
    return run("ConceptsTuneE4T", **{name: [value] for name, value in given.items()}).result[0]


@pytest.mark.parametrize("result", ["concept", "tuned model"])
def test_tuning_starts_where_the_release_says_and_learns(whole_model, clip, calm_vae, imported, eye, result):
    vae = calm_vae
    start, later = (tuned(whole_model, clip, vae, imported, steps, clip_vision=eye, result=result) for steps in (0, 1))
    class_word = rows(clip, "cat")["clip_l"]
    moved = (start.words[0].vectors["clip_l"] - class_word).norm()
    said = published_words(weights(), pictures(), torch.zeros(1, UNET))  # the picture moves it most
    share = SHARE if result == "concept" else 1.0
    assert 0.3 < moved / (0.1 * share * said.norm()) < 3
    assert not torch.equal(start.words[0].vectors["clip_l"], later.words[0].vectors["clip_l"])
    if result == "tuned model":
        assert all(torch.equal(start.edit.offsets[layer].left, o.left) for layer, o in imported.offsets.items())


@pytest.mark.parametrize("steps", [1, 5, 100])
def test_the_encoder_is_tuned_at_the_published_rate_and_batch(imported, steps):
    recipe = whole_recipe(imported, "<mine>", steps, 5)
    assert imported.encoder.tuning_rate * recipe.learning_rate == pytest.approx(1.6e-5)
    assert recipe.batch_size * recipe.accumulation == 16


def test_tuning_leaves_the_domain_and_copies_no_image_matrices(imported):
    twin = copy.deepcopy(imported.encoder)
    assert twin.released.image_linears is imported.encoder.released.image_linears
    assert twin.released.final_linear.weight is not imported.encoder.released.final_linear.weight


def test_a_frozen_clip_vision_is_the_one_given(models):
    write(models / "cats", FROZEN, encoder=weights(), weight_offsets=OFFSETS)
    given = make_clip_vision()
    domain, eye, _ = run("ConceptsImportE4T", folder="cats", name="", clip_vision=given).result
    assert eye is given and domain.vision == Vision(given).fingerprint


def test_a_trained_clip_vision_is_the_releases_own(models, eye):
    domain, own, _ = run("ConceptsImportE4T", folder="cats", name="", clip_vision=make_clip_vision()).result
    assert Vision(own).fingerprint == domain.vision == Vision(eye).fingerprint != Vision(make_clip_vision()).fingerprint


@pytest.mark.parametrize(("given", "said"), [
    (None, "encoder.pt of cats brings no CLIP vision along; connect the one"),
    ({"hidden_size": 48}, r"hears a picture as one vector and 16 patches of 32 numbers, not as \(48,\) and \(16, 48\)"),
    ({"image_size": 28}, r"and 16 patches of 32 numbers, not as \(32,\) and \(4, 32\): use the CLIP vision"),
    ({"model_type": "siglip_vision_model"}, "no CLS token"),
])
def test_a_missing_or_wrong_clip_vision_is_one_sentence(models, given, said):
    write(models / "cats", FROZEN, encoder=weights(), weight_offsets=OFFSETS)
    with pytest.raises(ValueError, match=said):
        run("ConceptsImportE4T", folder="cats", name="", clip_vision=given and make_clip_vision(**given))
    assert not list(models.glob("*.safetensors"))


def test_tuning_with_another_clip_vision_is_one_sentence(whole_model, clip, vae, imported):
    for given, said in ((None, "sees pictures through CLIP vision"), (make_clip_vision(), "another CLIP vision")):
        with pytest.raises(ValueError, match=said):
            tuned(whole_model, clip, vae, imported, clip_vision=given)


@pytest.mark.parametrize("extra", ["unet", "text_encoder"])
def test_a_tuned_model_is_no_domain(models, extra):
    own = {"conv_in.weight": torch.ones(2, 4, 3, 3)}
    files = {"unet": own | OFFSETS} if extra == "unet" else {"weight_offsets": OFFSETS, "text_encoder": own}
    (models / "cats" / "weight_offsets.pt").unlink()
    write(models / "cats", {"seed": 1, "pretrained_args": TRAINED}, encoder=weights(), **files)
    with pytest.raises(ValueError, match="whole model that was tuned on one picture of a cat.*use Import Tuned E4T"):
        run("ConceptsImportE4T", folder="cats", name="")


def tuned_unet(model, rank=2):
    """A UNet under diffusers' names whose attention matrices differ by a change of this rank, and one other weight."""
    generator, tuned = torch.Generator().manual_seed(3), {}
    own = model.model.diffusion_model.state_dict()
    for theirs, ours in diffusers_names(model).items():
        weight = own[ours].clone()
        if re.search(r"attn[12]\.to_.*weight", ours):
            out, given = weight.shape
            weight += 0.1 * (torch.randn(out, rank, generator=generator) @ torch.randn(rank, given, generator=generator)
                             / given**0.5)
        tuned[theirs] = weight
    tuned["conv_in.bias"] = tuned["conv_in.bias"] + 0.01
    return tuned


@pytest.fixture
def mine(models, whole_model):
    """models/e4t with a folder that was tuned on one picture."""
    write(models / "mine", {"seed": 1, "pretrained_args": TRAINED}, encoder=weights(),
          unet=tuned_unet(whole_model) | OFFSETS)
    Image.fromarray((pictures()[0].numpy() * 255).round().astype("uint8")).save(models / "mine" / "domain.png")
    return models / "mine"


def import_mine(model, clip, vae, **changes):
    """At rank 8, which a change of rank 2 has once the offsets of 1 + Δ, of rank 4, multiply it."""
    return run("ConceptsImportTunedE4T", **{"model": model, "clip": clip, "vae": vae, "folder": "mine",
                                            "placeholder": "<mine>", "rank": 8} | changes).result


def test_a_tuned_folder_becomes_a_concept(mine, whole_model, clip, calm_vae):
    """Its matrices are W_tuned ⊙ (1 + Δ), its word the mean of the published formula over sixteen noise levels."""
    concept, said = import_mine(whole_model, clip, calm_vae)
    assert "100 % is in attention matrices, of which rank 8 keeps 100 %" in said
    patched, taught = run("ConceptsApply", model=whole_model, clip=clip, concept=concept, strength=1.0, bias=0.7).result
    tuned, names = tuned_unet(whole_model), diffusers_names(whole_model)
    ours = {names[name].removesuffix(".weight"): tensor for name, tensor in tuned.items()}
    expected = {layer: ours[layer] for layer in attention_matrices(whole_model.model.diffusion_model, ALL_PARTS)}
    for name, _, _ in matrices(CHANNELS, WIDTH):
        expected[MATRICES[name]] = expected[MATRICES[name]] * (1 + published_offset(OFFSETS, name))
    patched.patch_model()
    try:
        for layer, matrix in attention_matrices(patched.model.diffusion_model, ALL_PARTS).items():
            assert (matrix.weight - expected[layer]).abs().max() < 1e-3 * expected[layer].abs().max()
        generator = torch.Generator().manual_seed(0)
        (square,) = squares(gather([pictures()]), 512)
        latent = to_latents(patched, calm_vae, square.picture[None])
        times = ((torch.arange(16) + 0.5) / 16 * 1000).long()
        noise = torch.randn(16, *latent.shape[1:], generator=generator)
        with torch.no_grad():
            features = unet_features(patched.model, latent.expand_as(noise), noise, times, *encode(clip, ""))
            moved = 0.1 * published_words(weights(), square.picture[None], features).mean(0)
    finally:
        patched.unpatch_model()
    found = concept.words[0].vectors["clip_l"][0] - rows(clip, "cat")["clip_l"][0]
    assert (found - moved).norm() < 0.02 * moved.norm()
    assert taught is not clip and difference_file.to_bytes(concept)


def test_what_is_loaded_with_the_model_is_no_part_of_a_tuned_folder(mine, whole_model, clip, calm_vae, imported):
    (offset,) = run("ConceptsApplyDomain", model=whole_model, domain=imported, strength=1.0).result
    before, _ = import_mine(whole_model, clip, calm_vae)
    comfy.model_management.load_models_gpu([offset])
    after, _ = import_mine(whole_model, clip, calm_vae)
    assert difference_file.to_bytes(after) == difference_file.to_bytes(before)


def test_a_tuned_folder_at_a_low_rank_says_what_is_lost(mine, whole_model, clip, calm_vae):
    concept, said = import_mine(whole_model, clip, calm_vae, rank=1)
    (share,) = map(int, re.findall(r"rank 1 keeps (\d+) %", said))
    assert 20 <= share < 100 and all(len(f.down) == 1 for f in concept.edit.added.values())


@pytest.mark.parametrize(("changes", "said"), [
    ({"folder": "cats"}, "cats holds a domain, not a model tuned on one picture.*Import E4T"),
    ({"placeholder": "two words"}, "placeholder"),
    ({"placeholder": "cat"}, "'cat' is a word the text encoder already knows"),
    ({"clip": None}, "This checkpoint file has no text encoder"),
    ({"vae": None}, "This checkpoint file has no VAE"),
])
def test_what_is_no_tuned_folder_is_one_sentence(mine, whole_model, clip, calm_vae, changes, said):
    with pytest.raises(ValueError, match=said):
        import_mine(whole_model, **{"clip": clip, "vae": calm_vae} | changes)


def test_a_tuned_folder_without_its_picture_or_for_another_unet(mine, whole_model, clip, calm_vae, model):
    with pytest.raises(ValueError, match="does not fit the model: .* connect the checkpoint"):
        import_mine(model, clip, calm_vae)
    (mine / "domain.png").unlink()
    with pytest.raises(ValueError, match="mine has no domain.png.*'image'"):
        import_mine(whole_model, clip, calm_vae)
    assert import_mine(whole_model, clip, calm_vae, image=pictures())[0].words[0].placeholder == "<mine>"


def test_a_pretrained_domain_is_not_replaced(models):
    shape = Shape((8, 16), 4, {"clip_l": 4}, {"layer": 4}, side=32)
    domain_file.save(Domain("cat", "SD15", Encoder(shape), {}), models, "cat")
    before = (models / "cat.safetensors").read_bytes()
    with pytest.raises(ValueError, match="^cat.safetensors in models/e4t is a domain that was pretrained.*another"):
        run("ConceptsImportE4T", folder="cats", name="")
    assert (models / "cat.safetensors").read_bytes() == before
    for _ in range(2):
        assert run("ConceptsImportE4T", folder="cats", name="cat-release").result


def test_code_in_pickles_is_not_run(models):
    torch.save({"v": Evil(models / "trace")}, models / "cats" / "encoder.pt")
    with pytest.raises(ValueError, match="encoder.pt cannot be read without running code"):
        run("ConceptsImportE4T", folder="cats", name="")
    assert not (models / "trace").exists()


def test_a_damaged_clip_vision_in_the_release(models):
    damaged = {name: t for name, t in weights().items() if name != "clip_vision.ln_post.bias"}
    write(models / "cats", TRAINED, encoder=damaged, weight_offsets=OFFSETS)
    with pytest.raises(ValueError, match="CLIP vision in this file is damaged: it lacks '.*post_layernorm.bias'"):
        run("ConceptsImportE4T", folder="cats", name="")


@pytest.mark.parametrize("name", ["gone", "..", "../e4t", "", "."])
def test_folders_that_are_not_there(models, name):
    with pytest.raises(ValueError, match="There is no folder .* in models/e4t; press R"):
        run("ConceptsImportE4T", folder=name, name="")


def test_releases_are_listed_wherever_they_were_unpacked(models):
    (models / "downloads").mkdir()
    write(models / "downloads" / "e4t-v1", encoder=weights(), weight_offsets=OFFSETS)
    (models / "empty").mkdir()
    (models / "config.json").write_text("{}")
    node = NODES["ConceptsImportE4T"]
    (folder,) = [i for i in node.define_schema().inputs if i.id == "folder"]
    assert folder.options == ["cats", "downloads/e4t-v1"]
    before = node.fingerprint_inputs(folder="cats", name="")
    write(models / "cats", FROZEN, encoder=weights(), weight_offsets=OFFSETS)
    assert node.fingerprint_inputs(folder="cats", name="") != before


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_a_linked_release(models):
    (models / "linked").symlink_to((models / "cats").rename(models.parent / "elsewhere"))
    assert run("ConceptsImportE4T", folder="linked", name="").result


def test_words_of_another_size_than_the_clip(whole_model, clip, vae, models, eye):
    write(models / "cats", TRAINED, encoder=weights(word=24), weight_offsets=OFFSETS)
    domain = run("ConceptsImportE4T", folder="cats", name="").result[0]
    with pytest.raises(ValueError, match=r"words of 24 \(clip_l\) numbers.*32 \(clip_l\); load a checkpoint of SD15"):
        tuned(whole_model, clip, vae, domain, clip_vision=eye)


WRONG = {
    "lacks 'first_linears.3.bias'": lambda header, held: held.pop("encoder.first_linears.3.bias"),
    "also holds a tensor 'encoder.more'": lambda header, held: held.update({"encoder.more": torch.ones(1)}),
    "also holds a tensor 'encoder.first_linears.99.bias'": lambda header, held: held.update(
        {"encoder.first_linears.99.bias": torch.ones(WIDTH)}),
    "not finite numbers": lambda header, held: held["encoder.final_linear.bias"].fill_(torch.nan),
    "has the shape": lambda header, held: held.update({"encoder.feature_linear.weight": torch.ones(2, 2)}),
    "is not whole": lambda header, held: held.pop(next(name for name in held if name.startswith("left."))),
    "'other', which this version of the pack does not know": lambda header, held: header.update({"e4t.kind": "other"}),
    "either a stem of its own or a CLIP vision": lambda header, held: header.update({"e4t.vision": ""}),
    "e4t.shape is no shape": lambda header, held: header.pop("e4t.kind"),
}


@pytest.mark.parametrize("said", WRONG)
def test_damaged_files_are_one_sentence(imported, said):
    header, held = domain_file.parsed(domain_file.to_bytes(imported), "it")
    WRONG[said](header, held)
    with pytest.raises(ValueError, match=said) as caught:
        domain_file.from_bytes(domain_file.with_metadata(save(held), header), "bad.safetensors")
    assert str(caught.value).startswith("bad.safetensors") and "\n" not in str(caught.value)
