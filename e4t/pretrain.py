"""Pretrain an E4T domain on a folder of pictures of one class of things:

    python3 dev.py run e4t/pretrain.py --folder PICTURES --checkpoint FILE --word cat --minutes 60

A picture in the folder is a thing of its own; a subfolder holds several pictures of one thing, with masks beside them
(`1.mask.png`) where there are any. It goes on where it was stopped when it is started again with the same settings.
`dev.py run --processes 8` shares each batch over eight cards; the README says how several machines do.
"""

import argparse
import copy
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from math import cos, isfinite, pi
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..host.bases import base_name, check_pair, manner, native_side, predicts
from ..host.checkpoints import load_checkpoint, load_clip_vision
from ..host.clip_vision import Vision
from ..host.copies import encoded_by, fingerprint, private_copies
from ..host.cross_attention import sizes
from ..host.folders import DOMAINS, domains_folder, free_name, states_folder, unfinished_folder
from ..host.objective import timestep_count
from ..host.pictures import is_empty, to_latents
from ..host.sockets import CLIP, VAE, ModelPatcher
from ..host.text import encode, fingerprint_of, widths
from ..host.unet_features import unet_features
from ..host.weight_offsets import matrix_shapes
from ..perfusion.covariance import precision
from ..training.preview import to_pil
from ..training.states import States
from .domain import ENDING, Domain, file_name, load, save, to_bytes
from .encoder import Encoder, Shape
from .method import Predictor
from .offsets import Offset, new_offsets
from .recognition import recognise
from .samples import Pair, Samples, draw_pair, read_samples
from .validation import Look, errors, pictures, to_device
from .workers import Workers

NUMBERS = {"steps": int, "minutes": float, "batch_size": int, "rate": float, "offset_rate": float, "warmup": int,
           "regulariser": float, "edited": float, "times": float, "seed": int, "side": int,
           "recognition": int, "stem": float}
LOST = 10  # steps in a row without a gradient that can be used
log = logging.getLogger("concepts")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a domain learns, besides the models and the pictures.

    It ends after `steps` steps or `minutes` minutes, whichever comes first (0: no such end). Rates fall to nothing
    along a half cosine. `edited` is the share of steps that learn the word with its predicted values, `regulariser` the
    weight λ of how far predictions are from the class word, `times` as in `draw_pair`, `average` the most that the
    moving average of the parameters keeps of itself. A stem of its own first learns to tell subjects apart for
    `recognition` steps, but no more than `steps`, and from then on at the share `stem` of `rate`.
    """

    word: str
    steps: int = 0
    minutes: float = 0.0
    batch_size: int = 16
    rate: float = 1e-3
    stem: float = 0.1
    offset_rate: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.01
    regulariser: float = 1e-3
    scale: float = 1.0
    edited: float = 0.5
    offsets: bool = True
    times: float = 0.6
    average: float = 0.999
    recognition: int = 150
    seed: int = 0
    levels: tuple[int, ...] = (24, 48, 96, 160)
    side: int = 128


@dataclass(frozen=True)
class Keeping:
    """Where states go and how often, in minutes; `report` is every how many steps a line is written."""

    folder: Path
    minutes: float = 10.0
    report: int = 50


class Learner:
    """Encoder and offsets as they are trained, and their moving average, which is what is kept."""

    def __init__(self, unet: ModelPatcher, clip: CLIP, recipe: Recipe, metric: Tensor, samples: Samples,
                 start: Domain | None) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.device = recipe, unet.load_device
        heard = (samples.pictures.shape[3],) * samples.pictures.shape[2] if samples.vision else ()
        self.encoder = Encoder(shape_of(unet, clip, recipe, heard)).to(self.device)
        fresh = new_offsets(matrix_shapes(unet), recipe.seed) if recipe.offsets else {}
        if start:
            fresh = {name: start.offsets.get(name, offset) for name, offset in fresh.items()}
            self._go_on_from(start, samples.vision)
        self.offsets = {name: Offset(*(f.to(self.device).requires_grad_() for f in (offset.left, offset.right)))
                        for name, offset in fresh.items()}
        self.predictor = Predictor(unet, clip, recipe.word, self.encoder, self.offsets, recipe.scale, metric)
        factors = [factor for offset in self.offsets.values() for factor in (offset.left, offset.right)]
        self.trained = [*self.encoder.parameters(), *factors]
        self.mean = [parameter.detach().clone() for parameter in self.trained]
        self.clock = torch.zeros(1, dtype=torch.float64)
        self.lost = 0  # steps in a row that moved nothing
        heard = self.encoder.heard_parameters()
        others = [p for p in self.encoder.parameters() if not any(p is own for own in heard)]
        self.peaks = (recipe.stem * recipe.rate, recipe.rate, recipe.offset_rate, 0.0)
        groups = [{"params": params, "lr": peak} for params, peak in zip(
            (heard, others, factors, [*self.mean, self.clock]),  # the last no gradient moves but a state must hold
            self.peaks, strict=True)]
        self.optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=recipe.weight_decay)

    def _go_on_from(self, start: Domain, vision: str) -> None:
        if start.encoder.shape != self.encoder.shape:
            raise ValueError(f"The domain {start.word!r} has an encoder of another shape: go on from one of this base "
                             "and these levels, or from nothing.")
        if start.vision != vision:
            raise ValueError(f"The domain {start.word!r} hears another CLIP vision ({start.vision}) than this one "
                             f"({vision}): go on with the same, or from nothing.")
        self.encoder.load_state_dict(start.encoder.state_dict())

    def recognise(self, samples: Samples, workers: Workers) -> None:
        """Teaches a new stem to tell subjects apart."""
        started = time.monotonic()
        recognise(self.encoder, samples, min(self.recipe.recognition, self.recipe.steps or self.recipe.recognition),
                  self.recipe.seed)
        workers.average(parameter.data for parameter in self.encoder.heard_parameters())
        for mean, parameter in zip(self.mean, self.trained, strict=True):
            mean.copy_(parameter.detach())
        self.clock += time.monotonic() - started

    def restore(self, states: States, workers: Workers) -> list[float]:
        """Goes on from the first process's newest state, which others may not see; the losses up to it."""
        losses = states.restore(self.optimiser) if workers.first else []
        tensors = [tensor for group in self.optimiser.param_groups for tensor in group["params"]]
        held = {number: {name: value.cpu() for name, value in own.items()}
                for number, own in self.optimiser.state_dict()["state"].items()}
        losses, values, held = workers.of_first((losses, [tensor.detach().cpu() for tensor in tensors], held))
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": held})
        for tensor, value in zip(tensors, values, strict=True):
            tensor.data.copy_(value)
        return losses

    def step(self, pairs: Sequence[Pair], number: int, done: float, workers: Workers, bf16: bool) -> float:
        """One step at the share `done` of the whole, on a batch in equal parts; returns its loss.

        It moves nothing when the loss or the averaged gradient, which all processes have alike, is not finite. Raises
        ValueError at the tenth such step in a row.
        """
        factor = min(1.0, (number + 1) / (self.recipe.warmup + 1)) * (0.5 + 0.5 * cos(pi * done))
        for group, peak in zip(self.optimiser.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        self.optimiser.zero_grad()
        value = torch.zeros((), device=self.device)
        for pair in pairs:
            with sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                    loss = self.predictor.loss(to_device(pair, self.device), is_edited(number, self.recipe.edited),
                                               self.recipe.regulariser).mean() / len(pairs)
                loss.backward()
            value += loss.detach()
        workers.average([value, *(p.grad for p in self.trained if p.grad is not None)])
        norm = torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        if not isfinite(value.item()) or not isfinite(norm.item()):
            self.lost += 1
            if self.lost == LOST:
                raise ValueError(f"The loss stopped being a number at step {number + 2 - LOST}; a lower rate than "
                                 f"{self.recipe.rate:g} usually helps.")
            return value.item()
        self.lost = 0
        self.optimiser.step()
        kept = min(self.recipe.average, (1 + number) / (10 + number))
        with torch.no_grad():
            torch._foreach_lerp_(self.mean, [p.detach() for p in self.trained], 1 - kept)
        return value.item()

    def sound(self) -> bool:
        """Whether there is something to go on from: all numbers are finite, and not only since the loss was lost."""
        return self.lost < LOST and all(bool(tensor.isfinite().all()) for tensor in (*self.trained, *self.mean))

    def averaged(self) -> tuple[Encoder, dict[str, Offset]]:
        """Encoder and offsets of the moving average, as values of their own."""
        encoder = copy.deepcopy(self.encoder)
        mean = [tensor.clone() for tensor in self.mean]
        names = [name for name, _ in encoder.named_parameters()]
        encoder.load_state_dict(dict(zip(names, mean, strict=False)))
        factors = iter(mean[len(names):])
        return encoder, {name: Offset(next(factors), next(factors)) for name in self.offsets}


def is_edited(step: int, share: float) -> bool:
    """Whether this step learns with the values: as evenly as `share` allows."""
    return int((step + 1) * share) > int(step * share)


def shape_of(unet: ModelPatcher, clip: CLIP, recipe: Recipe, heard: tuple[int, ...] = ()) -> Shape:
    """The shape of a new encoder for these models, with a stem of its own unless it hears vectors of CLIP vision."""
    channels = unet.model.latent_format.latent_channels
    nothing = torch.zeros(1, channels, 64, 64, device=unet.load_device)
    level = torch.zeros(1, dtype=torch.long, device=unet.load_device)
    features = unet_features(unet.model, nothing, nothing, level, *encode(clip, ""))
    return Shape(heard or recipe.levels, features.shape[1], widths(clip),
                 {name: given for name, (_, given) in sizes(unet).items()}, stem=not heard, side=recipe.side)


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
