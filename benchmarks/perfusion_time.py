"""Speed and memory of Perfusion at Stable Diffusion 1.5's true shapes, random weights:
`python3 dev.py run benchmarks/perfusion_time.py`.

Sampling steps with 0, 1 and 8 concepts and with a model tuned by E4T taken in turn, a training step and its forward
pass taken in turn, and the peak memory of trainings alone in processes of their own, ComfyUI's LoRA training beside
ours. Medians and ratios. A concept of E4T with Perfusion is a Perfusion concept, so its speed is that of one concept.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from statistics import median

import comfy.sample
import numpy as np
import torch

from ..e4t.difference import Difference, LowRank, nothing_added
from ..e4t.offsets import RANK as OFFSET_RANK
from ..e4t.offsets import Offset, new_offsets
from ..e4t.tune_whole import RANK
from ..e4t.use import with_difference
from ..host.copies import private_copies
from ..host.cross_attention import sizes, with_edits
from ..host.objective import timestep_count
from ..host.weight_offsets import ALL_PARTS, matrix_shapes
from ..perfusion.apply import applied, overrides
from ..perfusion.concept import Edit
from ..perfusion.train import EditMethod, EditRecipe
from ..training.dataset import Lessons
from ..training.draws import draw
from ..training.loop import Plan, train
from .microworld import interval
from .step_time import SEED, make_clip, make_unet
from .timing import conditions, in_turn, keep, medians, peak_alone, peak_now, ratio, timed

WIDTH, TOKENS = 768, 77


def concepts(model, count: int, context: torch.Tensor) -> list:
    """Random concepts, each the encoding of another token of `context` (1 n d), so that all are at work."""
    generator = torch.Generator().manual_seed(SEED)
    made = []
    for number in range(count):
        values = {name: torch.randn(out, generator=generator) for name, (_, out) in sizes(model).items()}
        edit = Edit(context[0, 2 + 3 * number].clone(), torch.randn(WIDTH, generator=generator), values)
        made.append(applied(edit, torch.eye(WIDTH), f"<{number}>"))
    return made


def tuned(model):
    """A model whose attention matrices are all changed as tuning the whole model does, by random factors."""
    generator = torch.Generator().manual_seed(SEED)
    offsets = {name: Offset(0.01 * torch.randn(len(offset.left), OFFSET_RANK, generator=generator), offset.right)
               for name, offset in new_offsets(matrix_shapes(model), SEED).items()}
    added = {name: LowRank(0.01 * torch.randn(len(factors.up), RANK, generator=generator), factors.down)
             for name, factors in nothing_added(matrix_shapes(model, ALL_PARTS), RANK, SEED).items()}
    return with_difference(model, Difference(offsets, added), 1.0)


def sampling(size: int, rounds: int, steps: int) -> dict:
    """Seconds of a step with CFG, unpatched, with one and with eight concepts and with a tuned model, in turn."""
    model = make_unet()
    context = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    negative = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(2))
    noise = torch.randn(1, 4, size // 8, size // 8, generator=torch.Generator().manual_seed(SEED))
    models = {"unpatched": model, **{f"{n} concepts": with_edits(model, concepts(model, n, context), overrides)
                                     for n in (1, 8)}, "tuned model": tuned(model)}

    def step(patched) -> float:
        """The median of all steps but the first, which the host's loading and patching of weights comes before."""
        ends: list[float] = []
        comfy.sample.sample(patched, noise, steps + 1, 7.0, "euler", "normal", [[context, {}]], [[negative, {}]],
                            torch.zeros_like(noise), disable_pbar=True, seed=SEED,
                            callback=lambda *_: ends.append(time.perf_counter()))
        return median(after - before for before, after in pairwise(ends))

    times = in_turn({label: partial(step, patched) for label, patched in models.items()}, rounds)
    return {"seconds, median": medians(times),
            "÷ unpatched [median, 95 % interval]": {
                label: interval(np.divide(values, times["unpatched"]), average=np.median)
                for label, values in times.items() if label != "unpatched"}}


def training(stack: ExitStack, batch: int, size: int) -> dict:
    """Our training step and a forward pass of the plain model on the same batch."""
    model, clip = make_unet(), make_clip()
    unet, text = stack.enter_context(private_copies(model, clip))
    del model, clip
    latents = torch.randn(4, 1, 4, size // 8, size // 8, generator=torch.Generator().manual_seed(SEED))
    latents = latents.to(unet.load_device)
    recipe = EditRecipe("<mine>", "cat", steps=1, learning_rate=0.006, batch_size=batch, seed=SEED, own_masks=False)
    method = EditMethod(torch.eye(WIDTH), "", unet, text, recipe, Lessons(latents, None, ("",) * 4))
    plan = Plan(1, batch, SEED, timestep_count(unet.model))

    def forward() -> None:
        with torch.no_grad():
            method.loss(draw(latents, plan.levels, batch, SEED, 0))
            method.met.clear()

    return {"step": lambda: train(method, latents, plan, lambda losses: None), "forward": forward}


def native_lora(batch: int, size: int) -> None:
    """Two steps of ComfyUI's own LoRA training."""
    from comfy_extras.nodes_train import TrainLoraNode

    context = torch.randn(1, TOKENS, WIDTH)
    latents = {"samples": torch.randn(4, 4, size // 8, size // 8)}
    chosen = {
        "model": [make_unet()], "latents": [latents], "positive": [[[context, {}]]], "batch_size": [batch],
        "grad_accumulation_steps": [1], "steps": [2], "learning_rate": [5e-4], "rank": [8], "optimizer": ["AdamW"],
        "loss_function": ["MSE"], "seed": [0], "training_dtype": ["fp32"], "lora_dtype": ["fp32"],
        "quantized_backward": [False], "algorithm": ["LoRA"], "gradient_checkpointing": [False],
        "checkpoint_depth": [1], "offloading": [False], "existing_lora": ["[None]"], "bucket_mode": [False],
        "bypass_mode": [False],
    }  # fmt: skip
    TrainLoraNode.execute(**chosen)


def peak(which: str, batch: int, size: int) -> float:
    """Peak memory in GB of a process that takes two steps."""
    if which == "native":
        native_lora(batch, size)
        return peak_now()
    with ExitStack() as stack:
        step = training(stack, batch, size)["step"]
        step()
        step()
    return peak_now()


def steps(batch: int, size: int, rounds: int) -> dict:
    """Seconds of a training step and of a forward pass, taken in turn."""
    with ExitStack() as stack:
        actions = training(stack, batch, size)
        times = in_turn({name: timed(action) for name, action in actions.items()}, rounds)
    return {"seconds, median": medians(times),
            "step ÷ forward [median, quartiles]": ratio(times["step"], times["forward"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--sampling-steps", type=int, default=2)
    parser.add_argument("--alone", choices=("ours", "native"), help="only print this one's peak memory in GB")
    args = parser.parse_args()
    if args.alone:
        print(peak(args.alone, args.batch, args.size))
        return
    memory = {which: peak_alone(__file__, which, args.batch, args.size) for which in ("ours", "native")}
    result = conditions(args.batch, args.size, args.rounds)
    result |= {"peak GB": memory, "peak, ours ÷ native LoRA": memory["ours"] / memory["native"]}
    result["training"] = steps(args.batch, args.size, args.rounds)
    result["sampling"] = sampling(args.size, args.rounds, args.sampling_steps)
    keep(result, "perfusion_time")


if __name__ == "__main__":
    main()
