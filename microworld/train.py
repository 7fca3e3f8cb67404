"""Train the sample model's UNet and text encoder: `python3 dev.py run microworld/train.py --minutes 90`.

Resumable: stop it at any time and start it again. It computes in bf16 on copies of fp32 weights, with Muon for matrices
and AdamW for the rest, a cosine rate and an exponential moving average. `--compile` (needs a C++ compiler on the CPU)
doubles its speed.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import time
from collections.abc import Callable

import comfy.clip_model
import comfy.ldm.modules.attention as attention
import comfy.ops
import numpy as np
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.taesd.taesd import TAESD
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from . import text
from .captions import caption
from .data import pictures, work
from .muon import Muon

BATCH, RATE, WARMUP, DECAY = 64, 7e-4, 200, 0.998
CAPTIONS = 4
DROP, INSERT = 0.1, 0.05  # empty prompts for guidance; unknown words that change nothing
SHORT, FULL_LENGTH_FROM = 24, 0.95  # most of the training pads prompts to 24 tokens, the last part to all 77
TIMES = 0.6  # timesteps are 1000 u^TIMES for uniform u: more of the noisy ones, where a prompt decides
UNET = {
    "image_size": 16, "in_channels": 4, "out_channels": 4, "model_channels": 64, "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 2, 2], "transformer_depth": [1, 1, 1], "transformer_depth_output": [1] * 6,
    "transformer_depth_middle": 1, "context_dim": text.CONFIG["hidden_size"], "num_heads": 4, "num_head_channels": -1,
    "use_spatial_transformer": True, "use_linear_in_transformer": False, "legacy": False, "adm_in_channels": None,
    "use_temporal_attention": False, "use_temporal_resblock": False,
}  # fmt: skip


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.inference_mode()
def encode_pictures(seed: int, count: int) -> dict[str, torch.Tensor]:
    """Render `count` pictures and keep their latents (n, 4, 16, 16) and caption rows (n, CAPTIONS, 77)."""
    vae = TAESD()
    vae.load_state_dict(load_file(work("vae.safetensors")))
    vae = vae.to(device(), memory_format=torch.channels_last)
    latents, words = [], []
    chunks = list(pictures(seed, count))  # drawn before the VAE starts: the two would fight for the processor
    for index, (images, _, scenes, _) in enumerate(chunks):
        rng = np.random.default_rng([seed, index, 1])
        words.append(text.rows([caption(rng, scene) for scene in scenes for _ in range(CAPTIONS)]))
        x = rearrange(torch.from_numpy(images), "b h w c -> b c h w").to(device()).float().div(127.5).sub(1)
        with torch.autocast(device().type, torch.bfloat16):
            latents += [vae.encode(part).half().cpu() for part in x.to(memory_format=torch.channels_last).split(50)]
        print(f"encoded {index + 1} of {len(chunks)} chunks", flush=True)
    return {
        "latents": torch.cat(latents).contiguous(),
        "rows": rearrange(torch.cat(words), "(n c) t -> n c t", c=CAPTIONS).contiguous(),
    }


class Model(nn.Module):
    """The host's UNet and text transformer with fresh weights; the text side in its trainable, out-of-place form."""

    def __init__(self) -> None:
        super().__init__()
        ops = comfy.ops.disable_weight_init
        self.unet = UNetModel(**UNET, dtype=torch.float32, operations=ops)
        self.clip = comfy.clip_model.CLIPTextModel(text.CONFIG, torch.float32, None, ops)
        self.table = nn.Parameter(torch.empty(1 + len(text.word_ids()), text.CONFIG["hidden_size"]))
        self.initialise(torch.Generator().manual_seed(0))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        self.clip.text_model.embeddings.token_embedding = nn.Identity()
        for module in self.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                    parameter.fill_(name == "weight")
                elif name == "bias":
                    parameter.zero_()
                else:
                    parameter.normal_(0, 1 / math.sqrt(parameter[0].numel()), generator=generator)
        for parameter in (self.table, self.clip.text_model.embeddings.position_embedding.weight):
            parameter.normal_(0, 0.04, generator=generator)
        for name, module in self.unet.named_modules():
            if name.endswith(("out_layers.3", "proj_out")) or name == "out.2":
                module.weight.zero_()
        nn.init.eye_(self.clip.text_projection.weight).requires_grad_(False)

    def context(self, rows: torch.Tensor) -> torch.Tensor:
        """Caption rows (b, t) to encodings (b, t, d)."""
        model = self.clip.text_model
        x = self.table[rows] + model.embeddings.position_embedding.weight[: rows.shape[1]]
        mask = torch.full((rows.shape[1],) * 2, -1e4, device=x.device, dtype=x.dtype).triu_(1)
        for layer in model.encoder.layers:
            x = x + layer.self_attn(layer.layer_norm1(x), mask, attention.attention_basic)
            x = x + layer.mlp(layer.layer_norm2(x))
        return model.final_layer_norm(x)

    def forward(self, noisy: torch.Tensor, t: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Predict v (b, 4, h, w) of noisy latents at timesteps t (b,) under caption rows (b, n)."""
        noisy = noisy.to(self.table.dtype, memory_format=torch.channels_last)
        return self.unet(noisy, t, context=self.context(rows))


def alphas_cumprod() -> torch.Tensor:
    """Stable Diffusion's noise schedule."""
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0).float()


def v_loss(predict: Callable, x: torch.Tensor, rows: torch.Tensor, step: int, alphas: torch.Tensor) -> torch.Tensor:
    """v-prediction loss of clean latents x (b, 4, h, w) under caption rows (b, t); `predict` is `Model.forward`."""
    generator = torch.Generator().manual_seed(step)
    t = (1000 * torch.rand(len(x), generator=generator) ** TIMES).long()
    noise = torch.randn(x.shape, generator=generator).to(x)
    a = alphas[t].view(-1, 1, 1, 1).to(x)
    noisy, v = a.sqrt() * x + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * x
    return F.mse_loss(predict(noisy, t.to(x), rows).float(), v)


def batch(data: dict, step: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (b, 4, h, w) and caption rows (b, length) of a step, with empty prompts and unknown words mixed in."""
    generator = torch.Generator().manual_seed(step)
    which = torch.randint(len(data["latents"]), (BATCH,), generator=generator)
    rows = data["rows"][which, torch.randint(CAPTIONS, (BATCH,), generator=generator)].long()
    inserted = torch.rand(BATCH, generator=generator) < INSERT
    place = torch.randint(1, 8, (1,), generator=generator).item()
    rows[inserted, place + 1 :] = rows[inserted, place:-1]
    rows[inserted, place] = text.UNKNOWN
    empty = torch.rand(BATCH, generator=generator) < DROP
    rows[empty] = text.rows([""]).long()
    return data["latents"][which].float(), rows[:, :length]


def prepare(seed: int, count: int) -> dict[str, torch.Tensor]:
    path = work("latents.safetensors")
    if not path.exists():
        save_file(encode_pictures(seed, count), path)
    data = load_file(path)
    statistics = {"dim": (0, 2, 3), "keepdim": True}
    latents = data["latents"].float()
    data["mean"], data["std"] = latents.mean(**statistics), latents.std(**statistics)
    data["latents"] = (latents - data["mean"]) / data["std"]
    return data


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--pictures", type=int, default=40000)
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args()


def low_precision(master: Model) -> Model:
    """A bf16 copy of the model, in which forward and backward run."""
    model = copy.deepcopy(master).to(torch.bfloat16, memory_format=torch.channels_last)
    model.unet.dtype = torch.bfloat16
    return model


def matrices(model: Model) -> list[nn.Parameter]:
    """What Muon trains: every matrix and convolution between the first and the last, but no table of embeddings."""
    ends = ("table", "position_embedding", "input_blocks.0.", "unet.out.", "text_projection")
    return [p for name, p in model.named_parameters() if p.ndim > 1 and not any(end in name for end in ends)]


def optimisers(model: Model) -> tuple[Muon, torch.optim.AdamW]:
    hidden = matrices(model)
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return Muon(hidden), torch.optim.AdamW(rest, RATE, betas=(0.9, 0.99), weight_decay=0.0)


def take_step(master: Model, model: Model, muon: Muon, adam: torch.optim.AdamW, rate: float) -> None:
    """Move the fp32 weights along the bf16 gradients and round them back."""
    for weight, copied in zip(master.parameters(), model.parameters(), strict=True):
        weight.grad = None if copied.grad is None else copied.grad.float()
        copied.grad = None
    nn.utils.clip_grad_norm_(master.parameters(), 1.0)
    adam.param_groups[0]["lr"] = rate
    adam.step()
    muon.step(rate)
    with torch.no_grad():
        torch._foreach_copy_(list(model.parameters()), list(master.parameters()))


def main() -> None:
    args = parse()
    attention.optimized_attention = attention.attention_basic  # several times faster backward on CPU
    data, alphas = prepare(2, args.pictures), alphas_cumprod()
    print(f"latent mean {data['mean'].flatten().tolist()} std {data['std'].flatten().tolist()}", flush=True)
    master = Model().to(device(), memory_format=torch.channels_last)
    if work("text.safetensors").exists():
        master.load_state_dict(load_file(work("text.safetensors")), strict=False)
    muon, adam = optimisers(master)
    average = {key: value.clone() for key, value in master.state_dict().items()}
    state_path, elapsed, first = work("state.pt"), 0.0, 0
    if state_path.exists():
        state = torch.load(state_path, map_location=device(), weights_only=True)
        master.load_state_dict(state["model"])
        adam.load_state_dict(state["adam"])
        muon.momenta = state["muon"]
        average, elapsed, first = state["average"], state["elapsed"], state["step"]
    model = low_precision(master)
    predict = {text.LENGTH: model.forward, SHORT: torch.compile(model.forward) if args.compile else model.forward}
    start, seen = time.monotonic() - elapsed, None
    for step in itertools.count(first):
        done = (time.monotonic() - start) / (60 * args.minutes)
        if done >= 1:
            break
        rate = RATE * min(1, (step + 1) / WARMUP) * math.cos(math.pi / 2 * done)
        length = text.LENGTH if done > FULL_LENGTH_FROM or step % 32 == 31 else SHORT
        x, rows = batch(data, step, length)
        value = v_loss(predict[length], x.to(device()), rows.to(device()), step, alphas)
        value.backward()
        take_step(master, model, muon, adam, rate)
        decay = min(DECAY, (1 + step) / (10 + step))
        torch._foreach_lerp_([average[k] for k in average], list(master.state_dict().values()), 1 - decay)
        seen = value.item() if seen is None else 0.99 * seen + 0.01 * value.item()
        if step % 100 == 0:
            speed = (step - first + 1) * BATCH / (time.monotonic() - start - elapsed)
            print(f"step {step} done {done:.3f} loss {seen:.4f} samples/s {speed:.1f}", flush=True)
        if step % 500 == 499:
            keep(master, muon, adam, average, step + 1, time.monotonic() - start, data)
    keep(master, muon, adam, average, step, 60 * args.minutes, data)


def keep(model: Model, muon: Muon, adam, average: dict, step: int, elapsed: float, data: dict) -> None:
    """Write the resumable state and the averaged weights."""
    state = {"model": model.state_dict(), "muon": muon.momenta, "adam": adam.state_dict(), "average": average}
    temporary = work("state.tmp")
    torch.save(state | {"step": step, "elapsed": elapsed}, temporary)
    temporary.replace(work("state.pt"))
    tensors = average | {"latent_mean": data["mean"], "latent_std": data["std"]}
    save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, work("average.safetensors"))


if __name__ == "__main__":
    main()
