"""Learning a word from photos: what Textual Inversion adds to the loop."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..host.bases import base_name
from ..host.clip_overlay import with_words
from ..host.copies import private_copies, settle
from ..host.folders import unfinished_folder
from ..host.objective import denoising_loss, timestep_count
from ..host.pictures import sample_picture, vae_encode
from ..host.progress import ProgressBar
from ..host.sockets import CLIP, VAE, ModelPatcher
from ..host.text import encode, rows
from ..training import preview
from ..training.dataset import cache_latents, single_photos, squares, working_side
from ..training.draws import Batch
from ..training.loop import Diverged, Plan, train
from .concept import Concept, Word
from .file import save
from .templates import OBJECT, fill
from .word import spread, with_norm

LARGEST_SIDE = 512
log = logging.getLogger("concepts")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is learned, besides the models and the photos."""

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


@dataclass(frozen=True)
class Preview:
    """What is shown meanwhile: a sample of `prompt` every `every` steps (0: only first and last)."""

    every: int = 100
    prompt: str = "a photo of a {}"
    cfg: float = 7.0
    steps: int = 20


@dataclass(frozen=True)
class Lesson:
    """The outcome: the concept, the loss of each step, and the page that shows them."""

    concept: Concept
    losses: list[float]
    sheet: Image.Image


class WordMethod:
    """The few numbers of a word as leaves on the private copies, and the loss they lower."""

    def __init__(self, unet: ModelPatcher, clip: CLIP, recipe: Recipe) -> None:
        self.recipe, self.model = recipe, unet.model
        device = clip.patcher.load_device
        self.leaves = {
            encoder: spread(start, recipe.vectors).clone().to(device).requires_grad_()
            for encoder, start in rows(clip, recipe.init_text).items()
        }
        self.norms = {encoder: leaf.detach().norm(dim=1).mean() for encoder, leaf in self.leaves.items()}
        self.clip = with_words(clip, [Word(recipe.placeholder, recipe.init_text, self.leaves)])

    def parameters(self) -> list[dict[str, Any]]:
        return [{"params": list(self.leaves.values()), "lr": self.recipe.learning_rate}]

    def loss(self, batch: Batch) -> Tensor:
        sentence = self.recipe.sentences[batch.lot % len(self.recipe.sentences)]
        context, pooled = encode(self.clip, fill(sentence, self.recipe.placeholder))
        return denoising_loss(self.model, batch.latents, batch.noise, batch.timesteps, context, pooled)

    def after_step(self) -> None:
        for encoder, leaf in self.leaves.items():
            leaf.data = with_norm(leaf.data, self.norms[encoder], self.recipe.norm_pull)

    def word(self) -> Word:
        """What is learned so far, as values of its own."""
        vectors = {encoder: leaf.detach().cpu().clone() for encoder, leaf in self.leaves.items()}
        return Word(self.recipe.placeholder, self.recipe.init_text, vectors)


@dataclass
class Watcher:
    """Samples on the way, and the live picture under the node."""

    method: WordMethod
    unet: ModelPatcher
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
        return fill(self.view.prompt, self.method.recipe.placeholder)

    def sample(self, label: str) -> None:
        picture = sample_picture(self.unet, self.method.clip, self.vae, self.prompt, self.shape,
                                 self.view.cfg, self.view.steps, self.method.recipe.seed)
        settle(self.unet, self.method.clip.patcher)
        self.samples.append((label, preview.to_pil(picture)))


def learn_word(
    model: ModelPatcher, clip: CLIP, vae: VAE, images: Sequence[Tensor], recipe: Recipe, view: Preview
) -> Lesson:
    """Learns `recipe.placeholder` from IMAGE batches (b h w c); `model`, `clip` and `vae` stay as they are.

    Cancelled on the way, it keeps a file of what was learned so far in output/concepts and returns that.
    Raises ValueError with one sentence for input it cannot learn from, and Diverged when the loss is lost.
    """
    base = base_name(model)
    photos = single_photos(images)
    photos = squares(photos, working_side(photos, recipe.resolution, LARGEST_SIDE))
    latents = model.model.process_latent_in(cache_latents(lambda p: vae_encode(vae, p), photos, recipe.mirror))
    with private_copies(model, clip) as (unet, text):
        method = WordMethod(unet, text, recipe)
        watcher = Watcher(method, unet, vae, latents.shape[2:], view)
        watcher.sample(f"step 0: {recipe.init_text}")
        latents = latents.to(unet.load_device).clone()  # made in inference mode until here
        plan = Plan(recipe.steps, recipe.batch_size, recipe.seed, timestep_count(unet.model))
        try:
            losses = train(method, latents, plan, watcher)
        except Diverged as error:
            kept = _keep(_concept(method, base, watcher, error.losses, photos), len(error.losses))
            raise Diverged(f"{error} What was learned before is kept in {kept}.", error.losses) from error
        if len(losses) < recipe.steps:
            try:
                watcher.sample(f"stopped at step {len(losses)}")
            finally:  # also when Cancel is pressed a second time
                kept = _keep(_concept(method, base, watcher, losses, photos), len(losses))
                log.info("Training stopped after %d of %d steps; kept in %s", len(losses), recipe.steps, kept)
        concept = _concept(method, base, watcher, losses, photos)
    return Lesson(concept, losses, _sheet(photos, watcher, losses))


def _concept(method: WordMethod, base: str, watcher: Watcher, losses: list[float], photos: Tensor) -> Concept:
    recipe = asdict(method.recipe) | {"photos": len(photos), "side": photos.shape[1], "steps_done": len(losses)}
    return Concept((method.word(),), metadata={
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{base}/textual-inversion",
        "modelspec.base_model": base,
        "modelspec.title": recipe["placeholder"].strip("<>"),
        "ssmd_cover_images": json.dumps([preview.cover(watcher.samples[-1][1])]),
        "concepts.training": json.dumps(recipe, sort_keys=True),
    })


def _keep(concept: Concept, steps: int) -> Path:
    name = concept.words[0].placeholder.strip("<>")
    return save(concept, unfinished_folder(), f"{name}-step{steps}")


def _sheet(photos: Tensor, watcher: Watcher, losses: list[float]) -> Image.Image:
    recipe = watcher.method.recipe
    title = f"{recipe.placeholder} from {len(photos)} photos, {len(losses)} of {recipe.steps} steps: “{watcher.prompt}”"
    return preview.sheet([preview.to_pil(p) for p in photos], watcher.samples, losses, recipe.steps, title)
