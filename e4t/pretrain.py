"""Pretrain an E4T domain on a folder of pictures of one class of things:

    python3 dev.py run e4t/pretrain.py --folder PICTURES --checkpoint FILE --word cat --minutes 60

A picture in the folder is a thing of its own; a subfolder holds several pictures of one thing, with masks beside them
(`1.mask.png`) where there are any. It goes on where it was stopped when it is started again with the same settings.
`dev.py run --processes 8` shares each batch over eight cards; the README says how several machines do.
"""

import argparse
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor

from ..host.bases import base_name, check_pair, manner, native_side, predicts
from ..host.checkpoints import load_checkpoint, load_clip_vision
from ..host.clip_vision import Vision
from ..host.copies import encoded_by, fingerprint, private_copies
from ..host.folders import DOMAINS, domains_folder, free_name, states_folder, unfinished_folder
from ..host.objective import timestep_count
from ..host.pictures import is_empty, to_latents
from ..host.sockets import CLIP, VAE, ModelPatcher
from ..host.text import fingerprint_of
from ..perfusion.covariance import precision
from ..training.preview import to_pil
from ..training.states import States
from .domain import ENDING, Domain, file_name, load, save, to_bytes
from .learner import Learner, Recipe
from .samples import Samples, draw_pair, read_samples
from .validation import Look, errors, pictures
from .workers import Workers

NUMBERS = {"steps": int, "minutes": float, "batch_size": int, "rate": float, "offset_rate": float, "warmup": int,
           "regulariser": float, "edited": float, "times": float, "seed": int, "side": int,
           "recognition": int, "stem": float}
log = logging.getLogger("concepts")


@dataclass(frozen=True)
class Keeping:
    """Where states go and how often, in minutes; `report` is every how many steps a line is written."""

    folder: Path
    minutes: float = 10.0
    report: int = 50


def check_shares(batch_size: int, processes: int, accumulation: int) -> None:
    """Raises ValueError unless a batch has as many pictures for each part that each process computes."""
    if accumulation < 1 or batch_size % (processes * accumulation):
        among = f"{processes} processes in {accumulation} parts each" if processes > 1 else f"{accumulation} parts"
        raise ValueError(f"A batch of {batch_size} pictures cannot be cut evenly into {among}; choose a batch size and "
                         "an accumulation that divides it.")


def pretrain(
    model: ModelPatcher, clip: CLIP, samples: Samples, recipe: Recipe, keeping: Keeping, metric: Tensor,
    workers: Workers | None = None, recompute: bool = False, bf16: bool = False,
    watch: Callable[[int, float], None] = lambda step, loss: None, kept: Callable[[Domain], None] = lambda domain: None,
    start: Domain | None = None, accumulation: int = 1, look: Look | None = None,
) -> Domain:
    """Learns a domain from samples; `model` and `clip` stay as they are, `metric` is C⁻¹ (d d) of the text encoder.

    It leaves a state, from which the same pretraining goes on, stopped on the way or with more steps or minutes.
    `watch` sees the loss of each step, `kept` the domain so far with every state. `start` is another domain to begin
    with, by default nothing. Gradients of a batch are accumulated over `accumulation` equal parts of it, which learns
    the same in less memory. With every state and at the end `look` gets pictures of unseen subjects. Raises ValueError
    with one sentence for input it cannot learn from, and when the loss is lost.
    """
    workers = workers or Workers()
    if not recipe.steps and not recipe.minutes:
        raise ValueError("Pretraining needs an end: give a number of steps or of minutes above 0.")
    check_shares(recipe.batch_size, workers.count, accumulation)
    given = recipe, *samples.latents.shape
    if workers.of_first(given) != given:
        raise ValueError("This process was given other settings or another number of pictures than the first of its "
                         "job; all machines need the same.")
    base = base_name(model)
    check_pair(model, clip)
    text = fingerprint_of(clip)
    with private_copies(model, clip, recompute) as (unet, encoder):
        weights = fingerprint(unet, encoder.patcher)
        learner = Learner(unet, encoder, recipe, metric, samples, start)
        states = States(keeping.folder, _run(recipe, samples, weights + manner(model), start), 1)
        losses = learner.restore(states, workers)
        held = min(32, len(samples.latents) // 10)
        lessons = samples.part(0, len(samples.latents) - held) if held else samples

        def domain() -> Domain:
            record = {**asdict(recipe), "subjects": len(samples.latents), "views": samples.latents.shape[1],
                      "unreadable": samples.unreadable, "steps_done": len(losses),
                      "seconds": round(learner.clock.item())}
            if start:
                record["start"] = json.loads(start.metadata.get("concepts.training", "{}"))
            return Domain(recipe.word, base, *learner.averaged(), recipe.scale, weights, text,
                          {"concepts.training": json.dumps(record, sort_keys=True, separators=(",", ":")),
                           "modelspec.prediction_type": predicts(model)},
                          samples.vision)

        try:
            if not learner.clock and not start:
                learner.recognise(lessons, workers)
                if workers.first:
                    states.save(losses, learner.optimiser)
            unseen = samples.part(len(samples.latents) - held, len(samples.latents))
            _train(learner, lessons, losses, keeping, states, workers, bf16, accumulation, watch,
                   lambda: kept(domain()),
                   lambda: _validated(learner, lessons, unseen, len(losses), unet, encoder, look))
        finally:
            learner.predictor.installed.close()
        return domain()


def _train(learner: Learner, lessons: Samples, losses: list[float], keeping: Keeping, states: States, workers: Workers,
           bf16: bool, accumulation: int, watch: Callable[[int, float], None], keep: Callable[[], None],
           validate: Callable[[], None]) -> None:
    recipe, size = learner.recipe, learner.recipe.batch_size // (workers.count * accumulation)
    levels = timestep_count(learner.predictor.model)
    before, started, kept = learner.clock.item(), time.monotonic(), time.monotonic()
    first = len(losses)
    try:
        while (done := _done(recipe, len(losses), learner.clock.item())) < 1:
            step = len(losses)
            pair = draw_pair(lessons, levels, recipe.batch_size, recipe.seed, step, workers.share(), recipe.times)
            losses.append(learner.step(list(pair.parts(size)), step, done, workers, bf16))
            clock = torch.tensor([before + time.monotonic() - started], dtype=torch.float64)
            workers.average([clock])
            learner.clock.copy_(clock)
            watch(len(losses), losses[-1])
            if workers.first and len(losses) % keeping.report == 0:
                speed = (len(losses) - first) * recipe.batch_size / (time.monotonic() - started)
                log.info("%s", _line(recipe, losses, learner.clock.item(), speed, done))
            if workers.first and time.monotonic() - kept > 60 * keeping.minutes and learner.sound():
                kept = time.monotonic()
                states.save(losses, learner.optimiser)
                keep()
                validate()
    finally:  # also at the end: more minutes go on from there
        if workers.first and len(losses) > first and learner.sound():
            states.save(losses, learner.optimiser)
    if workers.first:
        validate()


def _done(recipe: Recipe, steps: int, seconds: float) -> float:
    ends = ((steps, recipe.steps), (seconds, 60 * recipe.minutes))
    return max(reached / end for reached, end in ends if end)


def _line(recipe: Recipe, losses: list[float], seconds: float, speed: float, done: float) -> str:
    recent = [loss for loss in losses[-200:] if isfinite(loss)]
    left = seconds / max(done, 1e-9) * (1 - done) / 60
    return (f"step {len(losses)}: loss {sum(recent) / max(1, len(recent)):.4f}, {speed:.1f} samples/s, "
            f"{100 * done:.1f} % done, {left:.0f} min to go")


def _validated(learner: Learner, lessons: Samples, held: Samples, step: int, unet: ModelPatcher, clip: CLIP,
               look: Look | None) -> None:
    """Tells the errors of the moving average on subjects it has not seen, and shows what it draws of some."""
    averaged = learner.averaged()
    told = errors(learner.predictor, *averaged, held, learner.recipe.times) if len(held.latents) else (
        "too few to leave some for validation")
    log.info("step %d, unseen subjects: %s", step, told)
    if look:
        look.show(step, pictures(learner.predictor, unet, clip, look, *averaged,
                                 held if len(held.latents) else lessons, learner.recipe.seed))


def _run(recipe: Recipe, samples: Samples, weights: str, start: Domain | None) -> str:
    """A name for exactly this pretraining; one with more minutes goes on from the same states."""
    settings = {name: value for name, value in asdict(recipe).items() if name not in ("steps", "minutes")}
    digest = hashlib.sha256(f"{weights} {json.dumps(settings, sort_keys=True)} {tuple(samples.latents.shape)}".encode())
    digest.update(to_bytes(start) if start else b"")
    digest.update(samples.vision.encode())
    digest.update(samples.source.encode() or samples.latents[:, 0, :, ::4, ::4].contiguous().numpy().tobytes())
    word = re.sub(r"[^\w-]+", "-", recipe.word)
    return f"e4t-{word}-{digest.hexdigest()[:16]}"


def parser() -> argparse.ArgumentParser:
    """The settings of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="pictures of one class of things")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the checkpoint to learn for")
    parser.add_argument("--word", required=True, help="the class word, such as cat")
    parser.add_argument("--name", default="", help="what the domain file is called; the word by default")
    parser.add_argument("--clip-vision", type=Path, help="a CLIP vision to see with, not a new stem")
    parser.add_argument("--start", type=Path, help="a domain file to begin with")
    parser.add_argument("--output", type=Path, help="where it is saved; models/e4t by default")
    parser.add_argument("--work", type=Path, help="where encoded pictures and states are kept")
    parser.add_argument("--resolution", type=int, default=0, help="side of the training square in pixels; 0 is that "
                        "of the checkpoint: 512, 768 or 1024")
    parser.add_argument("--views", type=int, default=4, help="how many pictures or crops of each thing")
    parser.add_argument("--mirror", action="store_true", help="also learn from mirrored pictures")
    parser.add_argument("--mask-floor", type=float, default=0.1, help="weight of the loss outside masks")
    parser.add_argument("--keep-minutes", type=float, default=10.0, help="a state is kept every so many minutes")
    parser.add_argument("--accumulation", type=int, default=1, help="in how many parts a process computes its share of "
                        "a batch: less memory, the same result")
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing: less memory, slower")
    parser.add_argument("--fp32", action="store_true", help="no autocast to bf16; a UNet in fp16 computes in bf16")
    parser.add_argument("--preview-cfg", type=float, default=Look.cfg, help="guidance of the pictures on the way")
    parser.add_argument("--no-offsets", action="store_true", help="without weight offsets")
    for name, kind in NUMBERS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=getattr(Recipe, name))
    return parser


def run(args: argparse.Namespace, checkpoint: tuple[ModelPatcher, CLIP, VAE]) -> Path:
    """Reads the folder, pretrains, saves the domain and returns where it is."""
    model, clip, vae = checkpoint
    if is_empty(vae):
        raise ValueError(f"{args.checkpoint.name} has no VAE, which the pictures are encoded with.")
    base_name(model)
    check_pair(model, clip)
    name = file_name(args.name, args.word)
    output, name = (args.output, name) if args.output else (domains_folder(), free_name(DOMAINS, name, ENDING))
    workers = Workers()
    check_shares(args.batch_size, workers.count, args.accumulation)
    work = args.work or states_folder()
    vision = Vision(load_clip_vision(args.clip_vision)) if args.clip_vision else None
    side = args.resolution or native_side(model)
    recipe = Recipe(args.word, offsets=not args.no_offsets, **{name: getattr(args, name) for name in NUMBERS})

    def read() -> tuple[Samples, Tensor]:
        return read_samples(args.folder, args.views, side, recipe.side, args.mirror, args.mask_floor, recipe.seed,
                            partial(to_latents, model, vae), encoded_by(model, vae), work, vision), precision(clip)

    if workers.first:
        log.info("This pretraining computes on %s.", model.load_device)
    found = read() if workers.first_here else None  # others find on disk what it has made
    workers.wait()
    samples, metric = found or read()
    if workers.first:
        log.info("%d subjects in %d views; %d pictures could not be used.", *samples.latents.shape[:2],
                 samples.unreadable)

    def keep(so_far: Domain) -> None:
        try:
            save(so_far, output, f"{name}-unfinished", overwrite=True)
        except ValueError as error:
            log.warning("The pretraining goes on without this unfinished domain: %s", error)

    def show(step: int, picture: Tensor) -> None:
        path = unfinished_folder() / f"{Path(name).name}-step{step:07d}.png"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            to_pil(picture).save(path)
        except OSError as error:
            log.warning("The pretraining goes on without this picture: %s", error)
        else:
            log.info("Unseen subjects, and what is drawn of them: %s", path)

    domain = pretrain(model, clip, samples, recipe, Keeping(work, args.keep_minutes), metric, workers,
                      args.recompute, not args.fp32, kept=keep, start=args.start and load(args.start),
                      accumulation=args.accumulation, look=Look(vae, show, args.preview_cfg))
    path = output / f"{name}.safetensors"
    if workers.first:
        path = save(domain, output, name, overwrite=True)
        try:
            (output / f"{name}-unfinished{ENDING}").unlink(missing_ok=True)
        except OSError as error:
            log.warning("An unfinished domain is left over: %s", error)
        log.info("The domain is %s.", path)
    workers.close()
    return path


def main() -> None:
    args = parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    try:
        run(args, load_checkpoint(args.checkpoint))
    except ValueError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
