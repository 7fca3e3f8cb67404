"""Speed and memory of a Textual Inversion step: `python3 dev.py run benchmarks/step_time.py`.

This pack and the loop of diffusers' textual-inversion script on Stable Diffusion 1.5's true shapes with random weights,
same batch and picture size, steps taken in turn in one process; then each alone in a process of its own for its peak
memory. Reports medians, the ratio of the two with its quartiles, our step over our forward pass, and what the time goes
into by operator.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import torch
from torch.nn import functional as F

from ..host.copies import private_copies
from ..host.objective import timestep_count
from ..textual_inversion.train import Recipe, WordMethod
from ..training.dataset import Lessons
from ..training.draws import draw
from ..training.loop import Plan, train
from .timing import conditions, in_turn, keep, medians, peak_alone, peak_now, profiled, ratio, timed

UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "transformer_depth_middle": 1,
    "context_dim": 768, "use_spatial_transformer": True, "use_linear_in_transformer": False, "legacy": False,
    "adm_in_channels": None, "dtype": torch.float32, "use_temporal_attention": False, "use_temporal_resblock": False,
}  # fmt: skip
SEED, RATE = 0, 5e-3


class Target:
    """Stable Diffusion 1.5's text encoder, as the host describes it."""

    params: dict = {}
    clip = comfy.sd1_clip.SD1ClipModel
    tokenizer = comfy.sd1_clip.SD1Tokenizer


def fill(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(SEED)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.02, generator=generator)


def make_unet(disable_dynamic: bool = True) -> comfy.model_patcher.ModelPatcher:
    """SD1.5's UNet with random weights, as a loader gives it."""
    config = comfy.supported_models.SD15(dict(UNET))
    config.set_inference_dtype(torch.float32, None)
    device = comfy.model_management.get_torch_device()
    model = comfy.model_base.BaseModel(config, device=device)
    fill(model)
    patcher = comfy.model_patcher.ModelPatcher(model, device, device)
    patcher.cached_patcher_init = (make_unet, ())
    return patcher


def make_clip(disable_dynamic: bool = True) -> comfy.sd.CLIP:
    clip = comfy.sd.CLIP(Target, disable_dynamic=True)
    fill(clip.cond_stage_model)
    clip.patcher.cached_patcher_init = (lambda disable_dynamic=True: make_clip().patcher, ())
    return clip


def ours(stack: ExitStack, batch: int, size: int) -> dict[str, Callable]:
    """Our step and our forward pass; what they hold lives as long as `stack`."""
    model, clip = make_unet(), make_clip()
    unet, text = stack.enter_context(private_copies(model, clip))
    del model, clip
    latents = torch.randn(4, 1, 4, size // 8, size // 8, generator=torch.Generator().manual_seed(SEED))
    latents = latents.to(unet.load_device)
    recipe = Recipe("<mine>", "cat", steps=1, learning_rate=RATE, batch_size=batch, seed=SEED)
    method = WordMethod(unet, text, recipe, Lessons(latents, None, ("",) * 4))
    plan = Plan(1, batch, SEED, timestep_count(unet.model))

    def forward() -> None:
        with torch.no_grad():
            method.loss(draw(latents, plan.levels, batch, SEED, 0))

    return {"step": lambda: train(method, latents, plan, lambda losses: None), "forward": forward}


def theirs(batch: int, size: int) -> dict[str, Callable]:
    """A step as diffusers' script takes it: the optimiser holds the whole table, other rows are put back."""
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    device = comfy.model_management.get_torch_device()
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
    )
    config = CLIPTextConfig(
        vocab_size=49409, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        hidden_act="quick_gelu", bos_token_id=49406, eos_token_id=49407,
    )  # fmt: skip
    text = CLIPTextModel(config)
    fill(unet)
    fill(text)
    unet.to(device).requires_grad_(False)
    text.to(device).requires_grad_(False)
    table = text.get_input_embeddings().weight.requires_grad_(True)
    unchanged = table.detach().clone()
    optimiser = torch.optim.AdamW([table], RATE)
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    generator = torch.Generator().manual_seed(SEED)
    latents = torch.randn(batch, 4, size // 8, size // 8, generator=generator).to(device)
    tokens = torch.full((batch, 77), 49407)
    tokens[:, :6] = torch.tensor([49406, 320, 1125, 539, 320, 49408])

    def step() -> None:
        noise = torch.randn(latents.shape, generator=generator).to(device)
        t = torch.randint(1000, (batch,), generator=generator).to(device)
        context = text(tokens.to(device))[0]
        loss = F.mse_loss(unet(schedule.add_noise(latents, noise, t), t, context).sample, noise)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            table[:49408] = unchanged[:49408]
        loss.item()

    return {"step": step}


def interleaved(batch: int, size: int, rounds: int) -> dict:
    """Seconds of each kind of step, taken in turn."""
    with ExitStack() as stack:
        actions = {f"ours {name}": action for name, action in ours(stack, batch, size).items()}
        actions |= {f"diffusers {name}": action for name, action in theirs(batch, size).items()}
        times = in_turn({name: timed(action) for name, action in actions.items()}, rounds)
        profiles = {which: profiled(actions[f"{which} step"]) for which in ("ours", "diffusers")}
    return {
        "seconds, median": medians(times),
        "ours / diffusers [median, quartiles]": ratio(times["ours step"], times["diffusers step"]),
        "our step / our forward [median, quartiles]": ratio(times["ours step"], times["ours forward"]),
        "seconds by operator": profiles,
    }


def peak(which: str, batch: int, size: int) -> float:
    """Peak memory in GB of a process that takes two steps."""
    with ExitStack() as stack:
        action = (ours(stack, batch, size) if which == "ours" else theirs(batch, size))["step"]
        action()
        action()
    return peak_now()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--alone", choices=("ours", "diffusers"), help="only print this one's peak memory in GB")
    args = parser.parse_args()
    if args.alone:
        print(peak(args.alone, args.batch, args.size))
        return
    memory = {which: peak_alone(__file__, which, args.batch, args.size) for which in ("ours", "diffusers")}
    result = conditions(args.batch, args.size, args.rounds)
    result |= {"peak GB": memory, "peak, ours / diffusers": memory["ours"] / memory["diffusers"]}
    result |= interleaved(args.batch, args.size, args.rounds)
    keep(result, "step_time")


if __name__ == "__main__":
    main()
