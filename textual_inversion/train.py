"""Learning a word from photos: what Textual Inversion adds to the loop."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..host.bases import base_name, check_pair, manner, native_side, predicts
from ..host.clip_overlay import with_words
from ..host.copies import card_is_small, fingerprint, memory_is_short, private_copies, settle
from ..host.folders import states_folder, unfinished_folder
from ..host.objective import denoising_error, timestep_count
from ..host.pictures import sample_picture, to_latents
from ..host.progress import Cancelled, ProgressBar
from ..host.sockets import CLIP, VAE, ModelPatcher
from ..host.text import encode, encode_all, fingerprint_of, rows, word_places
from ..training import preview
from ..training.dataset import Lessons, Photo, cache, squares, weighted_mean, working_side
from ..training.draws import Batch
from ..training.loop import Diverged, Plan, train
from ..training.masks import zero_shot
from ..training.states import States
from .concept import Concept, Word
from .file import save
from .templates import BY_KIND, OBJECT, fill, sentence_of
from .word import spread, with_norm

log = logging.getLogger("concepts")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is learned, besides the models and the photos.

    `mask_floor` is the weight outside the masks; `own_masks` takes masks from what the model itself knows of the
    initial text (`training.masks`) where none are given. `snr_cap` is the γ of min-SNR (0: off), `crops` the number of
    random crops of each photo beside its largest square.
    """

    placeholder: str
    init_text: str
    steps: int
    learning_rate: float
    batch_size: int
    seed: int
    vectors: int = 1
    sentences: tuple[str, ...] = OBJECT
    norm_pull: float = 0.0
    resolution: int = 0
    mirror: bool = False
    crops: int = 0
    accumulation: int = 1
    optimiser: str = "AdamW"
    schedule: str = "cosine"
    warmup: int = 0
    snr_cap: float = 0.0
    mask_floor: float = 0.1
    own_masks: bool = False


@dataclass(frozen=True)
class Preview:
    """What is shown meanwhile: a sample of `prompt` every `every` steps (0: only first and last)."""

    every: int = 100
    prompt: str = "a photo of a {}"
    cfg: float = 7.0
    steps: int = 20


@dataclass(frozen=True)
class Keeping:
    """How a stopped training is continued: a state every `every` steps (0: none), the newest `keep` of them."""

    every: int = 100
    keep: int = 2
    resume: bool = True


@dataclass(frozen=True)
class Lesson:
    """The outcome: the concept, the loss of each step, and the page that shows them."""

    concept: Concept
    losses: list[float]
    sheet: Image.Image


class WordMethod:
    """The few numbers of a word as leaves on the private copies, and the loss they lower."""

    architecture = "textual-inversion"
    started_from = ""  # a digest of what decides the outcome beside recipe, lessons and models

    def __init__(self, unet: ModelPatcher, clip: CLIP, recipe: Recipe, lessons: Lessons) -> None:
        self.recipe, self.unet, self.model, self.weights = recipe, unet, unet.model, lessons.weights
        device = clip.patcher.load_device
        self.leaves = {
            encoder: spread(start, recipe.vectors).clone().to(device).requires_grad_()
            for encoder, start in rows(clip, recipe.init_text).items()
        }
        self.norms = {encoder: leaf.detach().norm(dim=1).mean() for encoder, leaf in self.leaves.items()}
        self.clip = with_words(clip, [Word(recipe.placeholder, recipe.init_text, self.leaves)])
        self.captions = [c and sentence_of(c, recipe.placeholder, recipe.init_text) for c in lessons.captions]
        for sentence in recipe.sentences:
            if not word_places(self.clip, fill(sentence, recipe.placeholder), self.leaves):
                raise ValueError(f"{recipe.placeholder} is not a word of its own in {sentence!r}, where it stands for "
                                 "{}; put a space between it and what touches it.")
        if recipe.own_masks and self.weights is None:
            self.weights = self._own_masks(clip, lessons.latents)
        elif recipe.own_masks and lessons.unmasked:
            photos = list(lessons.unmasked)
            self.weights = self.weights.clone()
            self.weights[photos] = self._own_masks(clip, lessons.latents[photos])

    def parameters(self) -> list[dict[str, Any]]:
        return [{"params": list(self.leaves.values()), "lr": self.recipe.learning_rate}]

    def loss(self, batch: Batch) -> Tensor:
        """Equation (2): the model's own loss under sentences with the word, of each sample (b)."""
        return self.error_under(batch, *encode_all(self.clip, self.prompts(batch)))

    def prompts(self, batch: Batch) -> list[str]:
        """What each sample is learned under: its caption, or one of the sentences."""
        sentence = self.recipe.sentences[batch.lot % len(self.recipe.sentences)]
        return [fill(self.captions[photo] or sentence, self.recipe.placeholder) for photo in batch.photos]

    def error_under(self, batch: Batch, context: Tensor, pooled: Tensor | None) -> Tensor:
        """The model's own loss of each sample (b) under encoded prompts (b n d), weighted by the masks."""
        error = denoising_error(self.model, batch.latents, batch.noise, batch.timesteps, context, pooled,
                                self.recipe.snr_cap)
        return weighted_mean(error, None if self.weights is None else self.weights[batch.photos, batch.views])

    def after_step(self) -> None:
        for encoder, leaf in self.leaves.items():
            leaf.data = with_norm(leaf.data, self.norms[encoder], self.recipe.norm_pull)

    def sampled(self) -> ModelPatcher:
        """The model as it draws with what is learned so far."""
        return self.unet

    def concept(self, metadata: Mapping[str, str]) -> Concept:
        """What is learned so far, as values of its own."""
        return Concept((self.word(),), metadata=metadata)

    def keep(self, concept: Concept, name: str) -> Path:
        """Saves what an unfinished training learned."""
        return save(concept, unfinished_folder(), name)

    def init_places(self, sentence: str) -> list[int]:
        """Where the tokens of the initial text are when it takes the word's place in a sentence."""
        last = word_places(self.clip, fill(sentence, self.recipe.placeholder), self.leaves)[0]
        first = last + 1 - self.recipe.vectors
        return list(range(first, first + len(next(iter(rows(self.clip, self.recipe.init_text).values())))))

    def _own_masks(self, clip: CLIP, latents: Tensor) -> Tensor:
        """The loss weight (n v 1 h w) of each place of latents (n v c h w) that no mask is known of."""
        sentence = "a photo of a {}"
        with torch.no_grad():
            named, empty = ((context.to(latents.device), pooled) for context, pooled in
                            (encode(clip, fill(sentence, self.recipe.init_text)), encode(clip, "")))
        plain = latents[:, :latents.shape[1] // (1 + self.recipe.mirror)]  # mirrored twins come after all of them
        masks = zero_shot(self.model, plain.flatten(0, 1), named, empty, self.init_places(sentence),
                          self.recipe.seed).unflatten(0, plain.shape[:2])
        floor = self.recipe.mask_floor
        return floor + (1 - floor) * (torch.cat([masks, masks.flip(-1)], 1) if self.recipe.mirror else masks)

    def word(self) -> Word:
        vectors = {encoder: leaf.detach().cpu().clone() for encoder, leaf in self.leaves.items()}
        return Word(self.recipe.placeholder, self.recipe.init_text, vectors)


@dataclass
class Watcher:
    """Samples on the way, and the live picture under the node."""

    method: WordMethod
    vae: VAE
    shape: tuple[int, ...]
    view: Preview
    samples: list[tuple[str, Image.Image]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.steps = self.method.recipe.steps
        self.bar = ProgressBar(self.steps)

    def __call__(self, losses: list[float]) -> None:
        done = len(losses)
        due = done == self.steps or (self.view.every and done % self.view.every == 0)
        if due:
            self.sample(f"step {done}")
        if due or done % max(1, self.steps // 50) == 0:
            newest = self.samples[-1][1] if self.samples else None
            picture = preview.live(losses, self.steps, newest, self.prompt)
            self.bar.update_absolute(done, self.steps, ("JPEG", picture, 832))
        else:
            self.bar.update_absolute(done, self.steps)

    @property
    def prompt(self) -> str:
        recipe = self.method.recipe
        prompt = self.view.prompt
        sentence = prompt if "{}" in prompt else sentence_of(prompt, recipe.placeholder, recipe.init_text)
        return fill(sentence, recipe.placeholder)

    def sample(self, label: str) -> None:
        try:
            picture = sample_picture(self.method.sampled(), self.method.clip, self.vae, self.prompt, self.shape,
                                     self.view.cfg, self.view.steps, self.method.recipe.seed)
        finally:  # also when it is cancelled: what is learned is read out of the copies as they were
            settle(self.method.unet, self.method.clip.patcher)
        self.samples.append((label, preview.small(picture)))


def learn_word(
    model: ModelPatcher, clip: CLIP, vae: VAE, photos: Sequence[Photo], recipe: Recipe, view: Preview,
    keeping: Keeping | None = None, recompute: bool | None = False, method_of: Callable[..., WordMethod] = WordMethod,
) -> Lesson:
    """Learns `recipe.placeholder` from photos; `model`, `clip` and `vae` stay as they are.

    `method_of(unet, clip, recipe, lessons)` is what learns: the word alone, unless another method adds to it.

    Cancelled on the way, it keeps a file of what was learned so far in output/concepts and returns that. With
    `keeping` the same training goes on where it was stopped, even by a crash, and ends as if it never had been.
    `recompute` halves the memory and costs a third of the speed; None does so where the card is short of memory.
    Raises ValueError with one sentence for input it cannot learn from, and Diverged when the loss is lost.
    """
    made_on = base_name(model), predicts(model)
    check_pair(model, clip)
    if recompute is None:
        recompute = memory_is_short(model, recipe.batch_size)
    side = working_side(photos, recipe.resolution, native_side(model))
    views = squares(photos, side, recipe.crops, recipe.mirror, recipe.seed)
    lessons = cache(partial(to_latents, model, vae), views, len(photos), recipe.mask_floor)
    shown = list(squares(photos, side))
    with private_copies(model, clip, recompute) as (unet, text):
        lessons = _on(lessons, unet.load_device)
        method = method_of(unet, text, recipe, lessons)
        models = f"{fingerprint(unet, text.patcher, vae.patcher)}{fingerprint_of(clip)}{manner(model)}"
        states = keeping and _states(keeping, method, photos, models)
        watcher = Watcher(method, vae, lessons.latents.shape[2:], view)
        watcher.sample(f"step 0: {recipe.init_text}")
        small = recompute and card_is_small(model, clip)
        plan = Plan(recipe.steps, recipe.batch_size, recipe.seed, timestep_count(unet.model), recipe.accumulation,
                    recipe.optimiser, recipe.schedule, recipe.warmup, at_once=1 if small else 0)
        try:
            losses = train(method, lessons.latents, plan, watcher, states)
        except Diverged as error:
            if not error.losses:
                raise
            kept = _keep(method, _concept(method, made_on, watcher, error.losses, shown), len(error.losses))
            raise Diverged(f"{error} What was learned before is {kept}.", error.losses) from error
        if len(losses) < recipe.steps:
            try:
                watcher.sample(f"stopped at step {len(losses)}")
            finally:  # also when Cancel is pressed a second time
                kept = _keep(method, _concept(method, made_on, watcher, losses, shown), len(losses))
                log.warning("Training stopped after %d of %d steps; the word is %s.", len(losses), recipe.steps, kept)
        concept = _concept(method, made_on, watcher, losses, shown)
    return Lesson(concept, losses, _sheet(shown, watcher, losses))


def _on(lessons: Lessons, device: torch.device) -> Lessons:
    """Ordinary tensors on the training device, whatever mode they were made in."""
    weights = None if lessons.weights is None else lessons.weights.to(device).clone()
    return replace(lessons, latents=lessons.latents.to(device).clone(), weights=weights)


def _states(keeping: Keeping, method: WordMethod, photos: Sequence[Photo], models: str) -> States:
    """The states of exactly this training: same method, recipe, photos, masks, captions, weights and clip-skip.

    Of the photos themselves, as a card may encode them a little differently the next time.
    """
    recipe, learner = json.dumps(asdict(method.recipe), sort_keys=True), f"{method.architecture} {method.started_from}"
    digest = hashlib.sha256(f"{models} {learner} {recipe}".encode())
    for photo in photos:
        digest.update(f"{photo.caption!r} {tuple(photo.picture.shape)}".encode())
        for part in (photo.picture, photo.mask):
            digest.update(b"none" if part is None else part.float().contiguous().cpu().numpy())
    name = method.recipe.placeholder.strip("<>")
    states = States(states_folder(), f"{name}-{digest.hexdigest()[:16]}", keeping.every, keeping.keep)
    if not keeping.resume:
        states.clear()
    return states


def _concept(method: WordMethod, made_on: tuple[str, str], watcher: Watcher, losses: list[float],
             photos: Sequence[Photo]) -> Concept:
    base, predicted = made_on
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{base}/{method.architecture}",
        "modelspec.base_model": base,
        **({"modelspec.prediction_type": predicted} if predicted else {}),
        "modelspec.title": method.recipe.placeholder.strip("<>"),
        "ssmd_cover_images": json.dumps([preview.cover(watcher.samples[-1][1])]),
        "concepts.training": record(method.recipe, len(photos), photos[0].picture.shape[0], len(losses)),
    }
    try:
        return method.concept(metadata)
    except Cancelled:  # the host's layers hear it; what is learned is not lost for it
        return method.concept(metadata)


def record(recipe: Recipe, photos: int, side: int, steps_done: int) -> str:
    """How a concept was learned, as short JSON: the recipe, with the sentences by the name of their kind.

    What is 0 or off is left out, as are a single vector, no accumulation, and placeholder and init text, which files
    name themselves. Rates have six digits.
    """
    kinds = {sentences: kind for kind, sentences in BY_KIND.items()}
    settings = asdict(recipe) | {"sentences": kinds.get(tuple(recipe.sentences), recipe.sentences)}
    for name in ("placeholder", "init_text", *(name for name in ("vectors", "accumulation") if settings[name] == 1)):
        del settings[name]
    said = {name: float(f"{value:.6g}") if isinstance(value, float) else value
            for name, value in settings.items() if value or name == "seed"}
    return json.dumps(said | {"photos": photos, "side": side, "steps_done": steps_done}, sort_keys=True,
                      separators=(",", ":"))


def _keep(method: WordMethod, concept: Concept, steps: int) -> str:
    """Keeps what was learned in a file, and says where or why not; a full disk costs only the file."""
    name = f"{concept.words[0].placeholder.strip('<>')}-step{steps}"
    try:
        return f"kept in {method.keep(concept, name)}"
    except ValueError as error:
        return f"not kept: {str(error).removesuffix('.')}"


def _sheet(photos: Sequence[Photo], watcher: Watcher, losses: list[float]) -> Image.Image:
    recipe = watcher.method.recipe
    title = f"{recipe.placeholder} from {len(photos)} photos, {len(losses)} of {recipe.steps} steps: “{watcher.prompt}”"
    return preview.sheet([preview.to_pil(p.picture) for p in photos], watcher.samples, losses, recipe.steps, title)
