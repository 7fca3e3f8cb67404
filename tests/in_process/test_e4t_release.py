"""mkshing's released E4T files: random weights under the released names, against the published formula done naively."""

import json
import os
import re
import zipfile

import comfy.utils
import pytest
import torch
from concepts_pack.e4t.release import read_release
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.nn.functional import leaky_relu, linear

WIDTH, UNET, WORD, TOKENS, CONTEXT = 16, 24, 12, 8, 12  # released: 1280, 10880, 768, 256, 768
CHANNELS = {"down_blocks.0": 8, "down_blocks.1": 10, "down_blocks.2": 14, "mid_block": 14, "up_blocks.1": 14,
            "up_blocks.2": 10, "up_blocks.3": 8}  # released: 320, 640 and 1280
CONFIG = {
    "pretrained_model_name_or_path": "CompVis/stable-diffusion-v1-4",
    "clip_model_name_or_path": "ViT-H-14::laion2b_s32b_b79k", "domain_class_token": "face", "placeholder_token": "*s",
    "domain_embed_scale": 0.1, "reg_lambda": 0.01, "prompt_template": "face", "resolution": 512, "revision": None,
}
SD15 = {"num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4], "transformer_depth": [1] * 6 + [0, 0],
        "transformer_depth_output": [1] * 9 + [0] * 3, "transformer_depth_middle": 1}


def matrices(channels=CHANNELS, context=CONTEXT):
    """(name, in, out) of every attention matrix that has an offset."""
    for block, width in channels.items():
        for a in range({"d": 2, "m": 1, "u": 3}[block[0]]):
            for attention in ("attn1", "attn2"):
                for part in "qkv":
                    heard = context if attention == "attn2" and part != "q" else width
                    yield f"{block}.attentions.{a}.transformer_blocks.0.{attention}.wo_{part}", heard, width


def layer(name, out, into, generator):
    """A linear layer as torch initialises one."""
    size = into ** -0.5
    return {f"{name}.weight": (torch.rand(out, into, generator=generator) * 2 - 1) * size,
            f"{name}.bias": (torch.rand(out, generator=generator) * 2 - 1) * size}


def random_offsets(seed=0, **sizes):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, into, out in matrices(**sizes):
        tensors[f"{name}.v"] = torch.rand(1, generator=generator) + 0.5
        tensors |= layer(f"{name}.linear1", into, 1, generator) | layer(f"{name}.linear2", out, 1, generator)
        tensors |= layer(f"{name}.linear_column", into, into, generator)
        tensors |= layer(f"{name}.linear_row", out, out, generator)
    return tensors


def random_encoder(seed=1, width=WIDTH, unet=UNET, word=WORD, tokens=TOKENS):
    generator = torch.Generator().manual_seed(seed)
    tensors = {"clip_vision.class_embedding": torch.randn(width, generator=generator),
               "clip_vision.transformer.resblocks.0.attn.in_proj_weight": torch.randn(width, 4, generator=generator)}
    tensors |= layer("unet_feature_embedder.0", width, unet, generator)
    tensors |= layer("unet_feature_embedder.2", width, width, generator)
    tensors |= layer("feature_linear", width, 2 * width, generator)
    for k in range(1 + tokens // 2):
        tensors |= layer(f"first_linears.{k}", width, width, generator)
    return tensors | layer("final_linear", word, width, generator)


def write(folder, config=CONFIG, save=torch.save, ending=".pt", **files):
    """A release of these files, by default a pretrained domain."""
    folder.mkdir(exist_ok=True)
    for name, tensors in (files or {"encoder": random_encoder(), "weight_offsets": random_offsets()}).items():
        save(tensors, folder / f"{name}{ending}")
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def published_offset(w, name):
    """WeightOffsets.forward of e4t-diffusion, a transpose at a time: (out in)."""
    x = linear(w[f"{name}.v"], w[f"{name}.linear1.weight"], w[f"{name}.linear1.bias"])
    y = linear(w[f"{name}.v"], w[f"{name}.linear2.weight"], w[f"{name}.linear2.bias"])
    matrix = x[:, None] * y[None, :]
    matrix = linear(matrix.T, w[f"{name}.linear_column.weight"], w[f"{name}.linear_column.bias"])
    matrix = linear(matrix.T, w[f"{name}.linear_row.weight"], w[f"{name}.linear_row.bias"])
    return matrix.T


def published_encoder(w, pooled, tokens, unet):
    """E4TEncoder.forward of e4t-diffusion after CLIP: (b word)."""
    def apply(name, value):
        return linear(value, w[f"{name}.weight"], w[f"{name}.bias"])

    unet = apply("unet_feature_embedder.2", leaky_relu(apply("unet_feature_embedder.0", unet)))
    heard = torch.cat([pooled[:, None], tokens[:, 1::2]], 1)
    outputs = [apply(f"first_linears.{k}", apply("feature_linear", torch.cat([heard[:, k], unet], 1)))
               for k in range(heard.shape[1])]
    return apply("final_linear", leaky_relu(torch.stack(outputs).mean(0)))


def features(batch=3, width=WIDTH, unet=UNET, tokens=TOKENS, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, *shape, generator=generator) for shape in ((width,), (tokens, width), (unet,))]


def host_layer(name):
    """ComfyUI's own answer to what a diffusers layer is called."""
    theirs = comfy.utils.unet_to_diffusers({k: list(v) if isinstance(v, list) else v for k, v in SD15.items()})
    return theirs[name.replace("wo_", "to_") + ".weight"].removesuffix(".weight")


def close(a, b):
    return (a - b).abs().max() <= 1e-5 * b.abs().max()


def check(release, offsets, encoder, strictness=close):
    """The whole release against the published formulas."""
    assert len(release.offsets) == 96
    for name, into, out in matrices():
        left, right = release.offsets[host_layer(name)]
        assert (left.shape, right.shape) == ((out, 3), (3, into))
        assert strictness(left @ right, published_offset(offsets, name))
    pooled, tokens, unet = features()
    with torch.no_grad():
        got = release.encoder(release.encoder.image_part(pooled, tokens), unet)
    assert strictness(got, published_encoder(encoder, pooled, tokens, unet))


def test_release_is_the_published_formula(tmp_path):
    release = read_release(write(tmp_path))
    check(release, random_offsets(), random_encoder())
    assert 0 < release.offset_error < 1e-5
    assert (release.domain_word, release.placeholder, release.scale) == ("face", "*s", 0.1)
    assert (release.base, release.prompt_template) == ("CompVis/stable-diffusion-v1-4", "face")
    assert not release.unet and not release.text_encoder


def test_offsets_are_of_rank_three_and_not_less():
    name, _, _ = next(matrices())
    values = torch.linalg.svdvals(published_offset({k: v.double() for k, v in random_offsets().items()}, name))
    assert values[2] > 1e-3 * values[0] > 1e9 * values[3]


def test_image_part_is_the_same_at_every_timestep(tmp_path):
    encoder = read_release(write(tmp_path)).encoder
    pooled, tokens, unet = features()
    with torch.no_grad():
        one = encoder.image_part(pooled[:1], tokens[:1])
        assert one.shape == (1, WIDTH)
        expected = published_encoder(random_encoder(), pooled[:1].expand(3, -1), tokens[:1].expand(3, -1, -1), unet)
        assert close(encoder(one, unet), expected)


def test_the_uneven_patches_are_not_heard(tmp_path):
    encoder = read_release(write(tmp_path)).encoder
    pooled, tokens, _ = features()
    before = encoder.image_part(pooled, tokens)
    assert torch.equal(before, encoder.image_part(pooled, tokens * torch.tensor([0.0, 1] * (TOKENS // 2))[:, None]))
    assert not close(before, encoder.image_part(pooled, tokens.roll(1, 1)))


def test_a_step_needs_few_parameters(tmp_path):
    encoder = read_release(write(tmp_path)).encoder
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert count == (UNET + 1 + WIDTH + 1 + WIDTH) * WIDTH + (WIDTH + 1) * WORD
    assert len(encoder.image_linears.firsts) == 1 + TOKENS // 2


def test_parameters_are_trainable_though_read_in_inference_mode(tmp_path):
    with torch.inference_mode():
        release = read_release(write(tmp_path))
    pooled, tokens, unet = features()
    release.encoder(release.encoder.image_part(pooled, tokens), unet).sum().backward()
    assert all(parameter.grad is not None for parameter in release.encoder.parameters())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module."])
def test_safetensors_and_names_of_wrapped_modules(tmp_path, prefix):
    offsets, encoder = random_offsets(), random_encoder()
    write(tmp_path, save=save_file, ending=".safetensors",
          encoder={prefix + name: tensor for name, tensor in encoder.items()},
          weight_offsets={prefix + name: tensor for name, tensor in offsets.items()})
    check(read_release(tmp_path), offsets, encoder)


def test_files_of_old_torch_load(tmp_path):
    write(tmp_path, save=lambda tensors, path: torch.save(tensors, path, _use_new_zipfile_serialization=False))
    assert not zipfile.is_zipfile(tmp_path / "encoder.pt")
    check(read_release(tmp_path), random_offsets(), random_encoder())


def test_half_precision_is_read_as_it_is(tmp_path):
    offsets, encoder = ({name: tensor.half() for name, tensor in tensors.items()}
                        for tensors in (random_offsets(), random_encoder()))
    release = read_release(write(tmp_path, encoder=encoder, weight_offsets=offsets))
    check(release, {k: v.float() for k, v in offsets.items()}, {k: v.float() for k, v in encoder.items()})


@pytest.mark.parametrize("extra", [{"text_encoder": {"text_model.embeddings.token_embedding.weight": torch.ones(4, 2)}},
                                   {}])
def test_tuned_folder(tmp_path, extra):
    own = {"conv_in.weight": torch.ones(2, 4, 3, 3), "mid_block.attentions.0.proj_in.weight": torch.ones(2)}
    config = {"pretrained_model_name_or_path": "/home/someone/e4t-face", "prompt_template": None, "reg_lambda": 0.1,
              "domain_embed_scale": 0.2, "pretrained_args": CONFIG}
    release = read_release(write(tmp_path, config, encoder=random_encoder(5), unet=own | random_offsets(6), **extra))
    check(release, random_offsets(6), random_encoder(5))
    assert (release.domain_word, release.base) == ("face", "CompVis/stable-diffusion-v1-4")
    assert release.scale == 0.2  # it was tuned with this one
    assert release.unet.keys() == own.keys() and all(torch.equal(release.unet[name], own[name]) for name in own)
    assert release.text_encoder.keys() == extra.get("text_encoder", {}).keys()


def test_tuned_folder_of_the_first_version_has_offsets_alone(tmp_path):
    release = read_release(write(tmp_path, {"seed": 42, "pretrained_args": CONFIG}))
    check(release, random_offsets(), random_encoder())
    assert release.scale == 0.1 and not release.unet


@pytest.mark.parametrize(("config", "kept"), [
    (CONFIG, True), (CONFIG | {"unfreeze_clip_vision": True}, True), (CONFIG | {"unfreeze_clip_vision": False}, False),
    ({"unfreeze_clip_vision": False, "pretrained_args": CONFIG | {"unfreeze_clip_vision": True}}, True),
    ({"unfreeze_clip_vision": False, "pretrained_args": CONFIG | {"unfreeze_clip_vision": False}}, False),
])
def test_clip_vision_is_kept_unless_it_was_frozen(tmp_path, config, kept):
    vision = read_release(write(tmp_path, config)).clip_vision
    assert vision.keys() == ({"class_embedding", "transformer.resblocks.0.attn.in_proj_weight"} if kept else set())


def test_encoder_without_clip_vision(tmp_path):
    encoder = {name: tensor for name, tensor in random_encoder().items() if "clip_vision" not in name}
    release = read_release(write(tmp_path, encoder=encoder, weight_offsets=random_offsets()))
    check(release, random_offsets(), random_encoder())
    assert release.clip_vision == {}


def test_config_is_read_with_patience(tmp_path):
    release = read_release(write(tmp_path, {"domain_class_token": " cat ", "something_new": [1, 2]}))
    assert (release.domain_word, release.placeholder, release.scale) == ("cat", "*s", 0.1)


class Evil:
    """A pickle that leaves a file behind when it is executed."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


@pytest.mark.parametrize("name", ["encoder", "weight_offsets", "unet", "text_encoder"])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_never_run(tmp_path, name, zipped):
    write(tmp_path)
    torch.save({"v": Evil(tmp_path / "trace")}, tmp_path / f"{name}.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=f"{name}.pt cannot be read without running code") as caught:
        read_release(tmp_path)
    assert "\n" not in str(caught.value) and "allowlist" not in str(caught.value)
    assert not (tmp_path / "trace").exists()
    torch.load(tmp_path / f"{name}.pt", weights_only=False)
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", ["encoder", "weight_offsets"])
@pytest.mark.parametrize("share", [0, 0.3, 0.999])
@pytest.mark.parametrize(("save", "ending"), [(torch.save, ".pt"), (save_file, ".safetensors")])
def test_cut_off_files(tmp_path, name, share, save, ending):
    path = write(tmp_path, save=save, ending=ending) / f"{name}{ending}"
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=f"{name}{re.escape(ending)} .*") as caught:
        read_release(tmp_path)
    assert "\n" not in str(caught.value)
    assert ending != ".pt" or str(caught.value) == f"{name}.pt is damaged or cut off; download it again."


@pytest.mark.parametrize("name", ["config.json", "encoder.pt", "weight_offsets.pt"])
def test_missing_file(tmp_path, name):
    (write(tmp_path) / name).unlink()
    with pytest.raises(ValueError, match=f"has no {name}"):
        read_release(tmp_path)


def test_not_a_folder(tmp_path):
    with pytest.raises(ValueError, match="encoder.pt is not a folder; choose the one that holds config.json"):
        read_release(write(tmp_path) / "encoder.pt")


@pytest.mark.parametrize(("name", "value"), [
    ("first_linears.2.weight", torch.ones(WIDTH, WIDTH + 1)), ("feature_linear.weight", torch.ones(WIDTH, WIDTH)),
    ("first_linears.0.bias", torch.ones(WIDTH + 1)), ("unet_feature_embedder.2.weight", torch.ones(WIDTH, UNET)),
    ("final_linear.weight", torch.ones(WORD)), ("final_linear.bias", torch.ones(WORD + 1)),
    ("final_linear.weight", torch.ones(0, WIDTH)), ("first_linears.1.weight", torch.ones(WIDTH, WIDTH).long()),
    ("first_linears.3.weight", None), ("first_linears.3.bias", None), ("unet_feature_embedder.0.weight", "text"),
    ("first_linears.1.weight", torch.ones(WIDTH, WIDTH).to_sparse()),
    ("first_linears.1.weight", torch.ones(1).expand(WIDTH, WIDTH)),
])
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_malformed_encoder(tmp_path, name, value):
    encoder = {key: tensor for key, tensor in (random_encoder() | {name: value}).items() if tensor is not None}
    write(tmp_path, encoder=encoder, weight_offsets=random_offsets())
    with pytest.raises(ValueError, match=f"encoder.pt (is malformed: '{name}' has the shape|lacks '{name}')"):
        read_release(tmp_path)


@pytest.mark.parametrize(("part", "value"), [
    ("linear_row.weight", torch.ones(8, 9)), ("linear_column.weight", torch.ones(9, 9)), ("v", torch.ones(2)),
    ("linear1.weight", torch.ones(8)), ("linear2.bias", torch.ones(1)), ("linear_row.bias", torch.ones(())),
    ("v", None),
])
def test_malformed_offsets(tmp_path, part, value):
    key = f"up_blocks.3.attentions.2.transformer_blocks.0.attn1.wo_v.{part}"
    offsets = {name: tensor for name, tensor in (random_offsets() | {key: value}).items() if tensor is not None}
    with pytest.raises(ValueError, match=r"weight_offsets.pt (is malformed: '|lacks ')up_blocks\.3\.attentions\.2"):
        read_release(write(tmp_path, encoder=random_encoder(), weight_offsets=offsets))


@pytest.mark.parametrize(("name", "key"), [
    ("encoder", "first_linears.2.weight"), ("encoder", "first_linears.2.bias"), ("encoder", "feature_linear.weight"),
    ("encoder", "final_linear.bias"), ("encoder", "unet_feature_embedder.0.weight"),
    ("weight_offsets", "mid_block.attentions.0.transformer_blocks.0.attn2.wo_k.linear_row.weight"),
])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_numbers(tmp_path, name, key, value):
    files = {"encoder": random_encoder(), "weight_offsets": random_offsets()}
    files[name][key].view(-1)[3] = value
    with pytest.raises(ValueError, match=rf"{name}.pt is damaged: '.*' holds? values that are not finite numbers"):
        read_release(write(tmp_path, **files))


def test_numbers_too_large_to_multiply(tmp_path):
    offsets = random_offsets()
    name, _, _ = next(matrices())
    offsets[f"{name}.linear_row.weight"] *= 1e38
    offsets[f"{name}.linear_column.weight"] *= 1e38
    with pytest.raises(ValueError, match="weight_offsets.pt is damaged: the numbers of .* are too large"):
        read_release(write(tmp_path, encoder=random_encoder(), weight_offsets=offsets))


def test_a_config_that_an_editor_of_windows_saved(tmp_path):
    write(tmp_path, encoder=random_encoder(), weight_offsets=random_offsets())
    config = tmp_path / "config.json"
    config.write_text(config.read_text("utf-8"), encoding="utf-8-sig")
    assert read_release(tmp_path).domain_word == CONFIG["domain_class_token"]


def test_the_encoder_before_the_release_is_named(tmp_path):
    generator = torch.Generator().manual_seed(0)
    legacy = layer("linear", 8, 8, generator) | layer("final_linear", WORD, 8 + 22, generator)
    with pytest.raises(ValueError, match="encoder.pt is of e4t-diffusion before April 2023"):
        read_release(write(tmp_path, encoder=legacy, weight_offsets=random_offsets()))


@pytest.mark.parametrize("content", [[torch.ones(2)], "text", {}, {1: torch.ones(2)}, torch.ones(3)])
def test_other_pickles_are_named(tmp_path, content):
    with pytest.raises(ValueError, match="encoder.pt (is malformed|lacks 'final_linear.weight')"):
        read_release(write(tmp_path, encoder=content, weight_offsets=random_offsets()))


SCALE = '{"domain_class_token": "face", "domain_embed_scale": %s}'


@pytest.mark.parametrize(("text", "sentence"), [
    ("{", "config.json cannot be read"), ("[]", "config.json is malformed: it holds a list"),
    ("\ufeff", "config.json cannot be read"), ("[" * 100000, "config.json cannot be read"),
    (" " * 2**21, "config.json cannot be read: it is too large"),
    ("{}", "says '' for domain_class_token; write a word"),
    ('{"domain_class_token": 3}', "says 3 for domain_class_token; write a word"),
    *((SCALE % value, "for domain_embed_scale; write a number above 0")
      for value in ("0", "-1", "NaN", "Infinity", "true", '"0.1"', "1" + "0" * 400)),
])
def test_malformed_config(tmp_path, text, sentence):
    write(tmp_path)
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=sentence) as caught:
        read_release(tmp_path)
    assert "\n" not in str(caught.value)


def test_features_of_another_clip_vision_or_unet(tmp_path):
    encoder = read_release(write(tmp_path)).encoder
    pooled, tokens, unet = features()
    with_cls = torch.cat([pooled[:, None], tokens], 1)
    for wrong in ((pooled, with_cls), (pooled[:, 1:], tokens), (pooled, tokens[:, :, 1:]), (pooled, tokens[:, ::2]),
                  (pooled[:2], tokens), (pooled, tokens[0])):
        with pytest.raises(ValueError, match="as one vector and 8 patches of 16 numbers, not as .*ViT-H/14"):
            encoder.image_part(*wrong)
    with pytest.raises(ValueError, match="hears a UNet as 24 numbers, not 23"):
        encoder(encoder.image_part(pooled, tokens), unet[:, 1:])


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(max_examples=60)
@given(st.data())
def test_damaged_files_never_crash(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    path = write(folder) / data.draw(st.sampled_from(("encoder.pt", "weight_offsets.pt", "config.json")))
    good = path.read_bytes()
    place = data.draw(st.integers(0, len(good) - 1))
    path.write_bytes(good[:place] if data.draw(st.booleans()) else good[:place] + b"\xff" + good[place + 1:])
    try:
        release = read_release(folder)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert len(release.offsets) == 96


def resident() -> int:
    """Bytes of this process that are not pages of files."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="tells mapped from copied on Linux alone")
@pytest.mark.parametrize(("save", "ending"), [(torch.save, ".pt"), (save_file, ".safetensors")])
def test_large_matrices_stay_in_the_file(tmp_path, save, ending):
    sizes = {"width": 512, "tokens": 128}
    write(tmp_path, save=save, ending=ending, encoder=random_encoder(**sizes), weight_offsets=random_offsets())
    assert (tmp_path / f"encoder{ending}").stat().st_size > 64 * 2**20
    before = resident()
    release = read_release(tmp_path)
    pooled, tokens, _ = features(1, **sizes)
    release.encoder.image_part(pooled, tokens)
    assert resident() - before < 24 * 2**20


def test_offsets_at_full_size(tmp_path):
    """573 MB become under 2 MB; the slowest test here, some seconds."""
    channels = {block: {8: 320, 10: 640, 14: 1280}[width] for block, width in CHANNELS.items()}
    offsets = random_offsets(channels=channels, context=768)
    assert sum(tensor.numel() for tensor in offsets.values()) == 143_226_592  # as in the released file
    path = write(tmp_path, encoder=random_encoder(), weight_offsets=offsets) / "weight_offsets.pt"
    try:
        release = read_release(tmp_path)
    finally:
        path.unlink()
    assert sum(4 * (left.numel() + right.numel()) for left, right in release.offsets.values()) < 2e6
    assert 0 < release.offset_error < 1e-5
    for name, into, out in list(matrices(channels, 768))[7::24]:
        left, right = release.offsets[host_layer(name)]
        assert (len(left), right.shape[1]) == (out, into)
        assert close(left @ right, published_offset(offsets, name))
