"""Import of a release at its true size: `python3 dev.py run benchmarks/e4t_import.py`.

No published weights can be had here, so this writes files of the names, shapes and precision of
e4t-diffusion-ffhq-celebahq-v1 with random numbers, imports them, and compares offsets and words with the published
formula, written down once more below. The words are those of a pass through a UNet and a CLIP of SD1.x's full size,
also random. ComfyUI keeps CLIP vision in half precision and looks at pictures of 256 grey levels: words are compared
with and without that. Needs 5 GB of disk and 16 GB of memory; four minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from math import prod
from pathlib import Path

import comfy.model_base
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, interpolate, layer_norm, leaky_relu, linear, multi_head_attention_forward

from ..e4t import domain
from ..e4t.import_release import domain_of, half_error, report
from ..e4t.method import Predictor
from ..e4t.release import MATRICES, read_release
from ..host.clip_vision import Vision, from_open_clip
from ..host.copies import private_copies
from ..host.text import rows
from ..host.unet_features import unet_features
from ..host.weight_offsets import matrix_shapes
from .step_time import UNET

HERE = Path(__file__).parent
WORD, SCALE, SIDE = "face", 0.1, 224
WIDTH, LAYERS, PATCHES, FEATURES, SAID = 1280, 32, 256, 10880, 768
CONFIG = {
    "pretrained_model_name_or_path": "CompVis/stable-diffusion-v1-4", "domain_class_token": WORD,
    "clip_model_name_or_path": "ViT-H-14::laion2b_s32b_b79k", "placeholder_token": "*s", "domain_embed_scale": SCALE,
    "prompt_template": WORD, "unfreeze_clip_vision": True,
}


def linears(sizes: dict[str, tuple[int, int]], seed: int) -> dict[str, Tensor]:
    """Linear layers (out in) by name, as torch initialises them."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, (out, into) in sizes.items():
        for part, shape in (("weight", (out, into)), ("bias", (out,))):
            made[f"{name}.{part}"] = (torch.rand(shape, generator=generator) * 2 - 1) * into**-0.5
    return made


def random_offsets(shapes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """weight_offsets.pt for matrices (out in) by the release's names."""
    sizes = {}
    for name, (out, into) in shapes.items():
        sizes |= {f"{name}.linear1": (into, 1), f"{name}.linear2": (out, 1), f"{name}.linear_column": (into, into),
                  f"{name}.linear_row": (out, out)}
    return {f"{name}.v": torch.ones(1) for name in shapes} | linears(sizes, 0)


def random_encoder() -> dict[str, Tensor]:
    """encoder.pt."""
    sizes = {"unet_feature_embedder.0": (WIDTH, FEATURES), "unet_feature_embedder.2": (WIDTH, WIDTH),
             "feature_linear": (WIDTH, 2 * WIDTH), "final_linear": (SAID, WIDTH),
             **{f"first_linears.{k}": (WIDTH, WIDTH) for k in range(1 + PATCHES // 2)}}
    generator = torch.Generator().manual_seed(1)
    vision = {"class_embedding": (WIDTH,), "positional_embedding": (1 + PATCHES, WIDTH),
              "conv1.weight": (WIDTH, 3, 14, 14)}
    clip = {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in vision.items()}
    blocks = [f"transformer.resblocks.{k}" for k in range(LAYERS)]
    for norm in ("ln_pre", "ln_post", *(f"{block}.ln_{n}" for block in blocks for n in (1, 2))):
        clip |= {f"{norm}.weight": torch.ones(WIDTH), f"{norm}.bias": torch.zeros(WIDTH)}
    own = linears({f"{block}.{name}": size for block in blocks for name, size in {
        "attn.in_proj": (3 * WIDTH, WIDTH), "attn.out_proj": (WIDTH, WIDTH), "mlp.c_fc": (4 * WIDTH, WIDTH),
        "mlp.c_proj": (WIDTH, 4 * WIDTH)}.items()}, 2)
    clip |= {name.replace("in_proj.", "in_proj_"): tensor for name, tensor in own.items()}
    return linears(sizes, 3) | {f"clip_vision.{name}": tensor for name, tensor in clip.items()}


def published_offset(w: dict[str, Tensor], name: str) -> Tensor:
    """WeightOffsets.forward of e4t-diffusion (out in), in double precision."""
    def apply(part: str, value: Tensor) -> Tensor:
        return linear(value, w[f"{name}.{part}.weight"].double(), w[f"{name}.{part}.bias"].double())

    v = w[f"{name}.v"].double()
    matrix = apply("linear1", v)[:, None] * apply("linear2", v)[None]
    return apply("linear_row", apply("linear_column", matrix.T).T).T


def published_vision(w: dict[str, Tensor], picture: Tensor, levels: float) -> tuple[Tensor, Tensor]:
    """open_clip's visual of one picture (1 h w 3) in 0..1: ln_post of CLS (1 d), and the patches before it (1 p d).

    `levels` is how many grey levels a picture has.
    """
    def norm(name: str, x: Tensor) -> Tensor:
        return layer_norm(x, (WIDTH,), w[f"clip_vision.{name}.weight"], w[f"clip_vision.{name}.bias"])

    x = interpolate(picture.movedim(-1, 1), (SIDE, SIDE), mode="bicubic", align_corners=True)
    x = (x.clamp(0, 1) * levels).round() / levels
    mean, std = torch.tensor([[0.48145466, 0.4578275, 0.40821073],
                              [0.26862954, 0.26130258, 0.27577711]])[..., None, None]
    x = conv2d((x - mean) / std, w["clip_vision.conv1.weight"], stride=14).flatten(2).transpose(1, 2)
    x = torch.cat([w["clip_vision.class_embedding"][None, None], x], 1) + w["clip_vision.positional_embedding"]
    x = norm("ln_pre", x)
    for k in range(LAYERS):
        block = f"transformer.resblocks.{k}"
        own = {name: w[f"clip_vision.{block}.{name}"] for name in (
            f"{layer}{part}" for layer in ("attn.in_proj_", "attn.out_proj.", "mlp.c_fc.", "mlp.c_proj.")
            for part in ("weight", "bias"))}
        y = norm(f"{block}.ln_1", x).transpose(0, 1)
        x = x + multi_head_attention_forward(
            y, y, y, WIDTH, 16, own["attn.in_proj_weight"], own["attn.in_proj_bias"], None, None, False, 0.0,
            own["attn.out_proj.weight"], own["attn.out_proj.bias"], need_weights=False)[0].transpose(0, 1)
        y = gelu(linear(norm(f"{block}.ln_2", x), own["mlp.c_fc.weight"], own["mlp.c_fc.bias"]))
        x = x + linear(y, own["mlp.c_proj.weight"], own["mlp.c_proj.bias"])
    return norm("ln_post", x[:, 0]), x[:, 1:]


def published_encoder(w: dict[str, Tensor], pooled: Tensor, tokens: Tensor, features: Tensor) -> Tensor:
    """E4TEncoder.forward of e4t-diffusion behind CLIP: for one picture and UNet features (b u), (b word)."""
    def apply(name: str, value: Tensor) -> Tensor:
        return linear(value, w[f"{name}.weight"], w[f"{name}.bias"])

    heard = apply("unet_feature_embedder.2", leaky_relu(apply("unet_feature_embedder.0", features)))
    vectors = torch.cat([pooled[:, None], tokens[:, 1::2]], 1)
    said = [apply(f"first_linears.{k}", apply("feature_linear", torch.cat([vector.expand_as(heard), heard], 1)))
            for k, vector in enumerate(vectors.unbind(1))]
    return apply("final_linear", leaky_relu(torch.stack(said).mean(0)))


def random_model() -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP]:
    """SD1.x's UNet and CLIP at full size."""
    config = comfy.supported_models.SD15(dict(UNET))
    config.set_inference_dtype(torch.float32, None)
    device = torch.device("cpu")
    model = comfy.model_base.BaseModel(config, device=device)
    clip = comfy.sd.CLIP(config.clip_target())
    for module, seed in ((model, 4), (clip.cond_stage_model, 5)):
        generator = torch.Generator().manual_seed(seed)
        for name, weight in module.named_parameters():
            if weight.ndim > 1:
                weight.data = torch.randn(weight.shape, generator=generator) * prod(weight.shape[1:]) ** -0.5
            else:
                weight.data = torch.full(weight.shape, float(name.endswith("weight")))
    return comfy.model_patcher.ModelPatcher(model, device, device), clip


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected number."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the files go for the while; a temporary folder by default")
    folder = parser.parse_args().folder
    model, clip = random_model()
    own = matrix_shapes(model)
    shapes = {theirs: own[ours] for theirs, ours in MATRICES.items()}
    with tempfile.TemporaryDirectory(dir=folder) as place:
        root = Path(place)
        for name, tensors in (("encoder", random_encoder()), ("weight_offsets", random_offsets(shapes))):
            torch.save(tensors, root / f"{name}.pt")
        (root / "config.json").write_text(json.dumps(CONFIG, indent=2))
        result = measured(root, model, clip)
    text = json.dumps(result, indent=1)
    (HERE / "results" / "e4t_import.json").write_text(text + "\n")
    print(text)


def measured(root: Path, model: comfy.model_patcher.ModelPatcher, clip: comfy.sd.CLIP) -> dict:
    """Sizes, seconds and errors of the import of the release in `root`."""
    seconds, start = {}, time.perf_counter()

    def took(what: str) -> None:
        nonlocal start
        seconds[what] = round(time.perf_counter() - start, 2)
        start = time.perf_counter()

    release = read_release(root)
    took("read, offsets reduced")
    vision = Vision(from_open_clip(release.clip_vision))
    took("CLIP vision made")
    made = domain_of(release, vision)
    path = domain.save(made, root, "domain")
    took("checked and saved")
    loaded = domain.load(path)
    took("loaded")
    weights = torch.load(root / "encoder.pt", mmap=True)
    offsets = torch.load(root / "weight_offsets.pt", mmap=True)
    picture = torch.rand(1, 512, 512, 3, generator=torch.Generator().manual_seed(6))
    kept = {name: tensor.half().float() if name.startswith("clip_vision.") else tensor
            for name, tensor in weights.items()}
    heard = {"": published_vision(kept, picture, 255),
             ", CLIP in single precision": published_vision(weights, picture, 1e6)}
    latents, noise = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    timesteps = torch.tensor([30, 500, 980])
    errors = {}
    with private_copies(model, clip) as (unet, text):
        for kind, known in (("imported", made), ("saved and loaded", loaded)):
            start = time.perf_counter()
            seen = known.encoder.seen(picture, vision)
            took(f"{kind}: what a picture adds, with CLIP vision")
            predictor = Predictor(unet, text, WORD, known.encoder, {}, known.scale, torch.zeros(0, 0))
            features = unet_features(unet.model, latents, noise, timesteps, *predictor.empty)
            start = time.perf_counter()
            known.encoder(seen, features)
            took(f"{kind}: the encoder at one step, 3 samples")
            said = predictor.words(predictor.predict(seen, latents, noise, timesteps))["clip_l"][:, 0]
            predictor.installed.close()
            for how, vectors in heard.items():
                expected = SCALE * published_encoder(weights, *vectors, features)
                errors[f"{kind}: words{how}"] = difference(said - rows(text, WORD)["clip_l"], expected)
            errors[f"{kind}: offsets"] = max(
                difference(offset.left.double() @ offset.right.double(), published_offset(offsets, theirs))
                for theirs, offset in ((theirs, known.offsets[ours]) for theirs, ours in MATRICES.items()))
    errors |= {"report: offsets of rank 3": release.offset_error,
               "report: in half precision": half_error(release.offsets)}
    sizes = {name: round((root / name).stat().st_size / 1e6, 1)
             for name in ("encoder.pt", "weight_offsets.pt", "domain.safetensors")}
    return {"MB": sizes, "numbers in weight_offsets.pt": sum(t.numel() for t in offsets.values()),
            "UNet features": features.shape[1], "largest relative error": errors, "seconds": seconds,
            "report": report(release, made.vision).splitlines()}


if __name__ == "__main__":
    main()
