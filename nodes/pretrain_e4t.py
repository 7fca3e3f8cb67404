"""Pretrain E4T Domain."""

from pathlib import Path

from comfy_api.latest import io
from torch import Tensor

from ..e4t import domain
from ..e4t.learner import Recipe
from ..e4t.pretrain import Keeping, check_shares, pretrain
from ..e4t.samples import read_samples
from ..e4t.validation import Look
from ..host.bases import base_name, check_pair, native_side
from ..host.clip_vision import Vision
from ..host.copies import computes_in_bf16, encoded_by, memory_is_short
from ..host.folders import DOMAINS, domains_folder, free_name, input_subfolder, input_subfolders, states_folder
from ..host.pictures import is_empty, to_latents
from ..host.progress import ProgressBar, shown, stop_if_cancelled
from ..microworld.domain import DOMAINS as SAMPLE_WORDS
from ..microworld.domain import write_instance
from ..perfusion.covariance import precision
from ..training.folder import ALL, ENDINGS
from ..training.folder import fingerprint as folder_fingerprint
from ..training.preview import to_pil
from .sockets import Domain

VIEWS, FLOOR = 4, 0.1
SAMPLES = {f"sample world: {word}": word for word in SAMPLE_WORDS}
SAMPLE_SIZE = 100  # things


def pictures_folder(name: str) -> Path:
    """A listed folder; those of the sample world are drawn first, a thing's pictures in a folder of its own."""
    if name not in SAMPLES:
        return input_subfolder(name)
    folder = states_folder() / f"sample-world-{SAMPLES[name]}"
    for number in range(SAMPLE_SIZE):
        stop_if_cancelled()
        write_instance(folder, SAMPLES[name], number, VIEWS)
    return folder


def file_of(name: str, word: str) -> str:
    """What the file of a domain is called. Raises ValueError without a class word, or for what no file can be
    called."""
    if not word:
        raise ValueError("The class word is empty; write the ordinary word for the things in the pictures.")
    return domain.file_name(name, word)


class ConceptsPretrainE4T(io.ComfyNode):
    """Learns an encoder for a class of things from many pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptsPretrainE4T",
            display_name="Pretrain E4T Domain",
            category="concepts/train",
            description=(
                "Learns once, from hundreds of pictures of one class of things, to say of a single picture what its "
                "thing is. Tune E4T then makes a concept of any such picture in a few steps. This node suits small "
                "jobs; for days on several cards there is the command in the README."
            ),
            search_aliases=["e4t", "encoder for tuning", "train encoder", "domain"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The checkpoint to learn for."),
                io.Clip.Input("clip", tooltip="The checkpoint's text encoder."),
                io.Vae.Input("vae", tooltip="The checkpoint's VAE. Pictures are encoded once, before the first step."),
                io.Combo.Input("folder", options=[*input_subfolders(), *SAMPLES], tooltip=(
                    "A folder in ComfyUI's input folder. Each picture in it is a thing of its own; a subfolder holds "
                    "several pictures of one thing, which is better, with masks beside them as 1.mask.png. The last "
                    "ones are drawn by the sample world, to try this on microworld.safetensors."
                )),
                io.String.Input("class_word", default="", placeholder="class word, such as: cat", tooltip=(
                    "The ordinary word for all of them."
                )),
                io.String.Input("name", default="", tooltip=(
                    "What the file in models/e4t is called; empty takes the class word. The same name replaces it; "
                    "that of a domain of the pack gets a number, as teddy_2."
                )),
                io.Int.Input("steps", default=5000, min=1, max=1000000, tooltip=(
                    "How long to learn. Thousands are needed; the more kinds of things, the more."
                )),
                io.Int.Input("batch_size", default=16, min=1, max=256, tooltip=(
                    "How many pictures each step looks at. Large batches matter here: 16 or more."
                )),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF,
                             control_after_generate=io.ControlAfterGenerate.fixed, tooltip=(
                    "Decides everything random. Leave it fixed: another seed is another pretraining."
                )),
                io.Float.Input("rate", default=0.001, min=0.000001, max=1.0, step=0.0001, round=0.000001, advanced=True,
                               tooltip="How far each step moves the encoder and the weight offsets."),
                io.Float.Input("regulariser", default=0.001, min=0.0, max=10.0, step=0.0001, round=0.000001,
                               advanced=True, tooltip=(
                    "How firmly predictions are kept near the class word, so that prompts stay in charge."
                )),
                io.Int.Input("resolution", default=0, min=0, max=2048, step=64, advanced=True, tooltip=(
                    "Side of the training square in pixels. 0 takes what the checkpoint was made for: 512 for Stable "
                    "Diffusion 1.x and 2.x, 768 for 2.x with v-prediction, 1024 for SDXL."
                )),
                io.Boolean.Input("mirror", default=False, advanced=True, tooltip="Also learn from mirrored pictures."),
                io.Int.Input("accumulation", default=1, min=1, max=256, advanced=True, optional=True, tooltip=(
                    "In how many parts a batch is computed, which must divide it: more take less memory and more time, "
                    "and learn the same."
                )),
                io.Float.Input("preview_cfg", default=Look.cfg, min=1.0, max=30.0, step=0.1, advanced=True,
                               optional=True, tooltip=(
                    "Guidance of the pictures that are drawn on the way; 3 suits the sample model."
                )),
                io.ClipVision.Input("clip_vision", optional=True, tooltip=(
                    "The eye of the encoder, as in the paper: CLIP vision ViT-L or ViT-H, from Load CLIP Vision. Tune "
                    "E4T then needs it too. Without it the encoder learns to see by itself."
                )),
            ],
            outputs=[
                Domain.Output("domain", display_name="domain", tooltip="What was learned, for Tune E4T."),
                io.Image.Output("samples", display_name="samples", tooltip=(
                    "Things it has not learned from, where there are ten or more, and below each what the domain draws "
                    "of it without any tuning."
                )),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str | None, **inputs) -> str:
        """Changed or added pictures are learned from, unless the folder's name is linked: the host does not tell it."""
        return folder_fingerprint(input_subfolder(folder), ALL, ENDINGS) if folder and folder not in SAMPLES else ""

    @classmethod
    def validate_inputs(cls, name: str | None = None, class_word: str | None = None) -> bool | str:
        """Why no domain can be called so, told before anything else runs; what is linked (None) is not known."""
        try:
            return name is None or class_word is None or bool(file_of(name, class_word.strip()))
        except ValueError as error:
            return str(error)

    @classmethod
    def execute(cls, model, clip, vae, folder, class_word, name, steps, batch_size, seed, rate, regulariser, resolution,
                mirror, accumulation=1, preview_cfg=Look.cfg, clip_vision=None) -> io.NodeOutput:
        word = class_word.strip()
        file = free_name(DOMAINS, file_of(name, word), domain.ENDING)
        if clip is None or is_empty(vae):
            raise ValueError("Pretraining needs the checkpoint's text encoder (CLIP) and its VAE; one of them is "
                             "missing in this file.")
        check_shares(batch_size, 1, accumulation)
        base_name(model)
        check_pair(model, clip)
        side = resolution or native_side(model)
        recipe = Recipe(word, steps, batch_size=batch_size, seed=seed, rate=rate, offset_rate=rate,
                        regulariser=regulariser, side=min(side, 224))

        def encode(pictures: Tensor) -> Tensor:
            stop_if_cancelled()
            return to_latents(model, vae, pictures)

        samples = read_samples(pictures_folder(folder), VIEWS, side, recipe.side, mirror, FLOOR, seed, encode,
                               encoded_by(model, vae), states_folder(), clip_vision and Vision(clip_vision))
        bar = ProgressBar(steps)

        def watch(step: int, loss: float) -> None:
            bar.update_absolute(step, steps)
            stop_if_cancelled()

        drawn: list[Tensor] = []

        def show(step: int, picture: Tensor) -> None:
            drawn[:] = [picture]
            bar.update_absolute(step, steps, ("JPEG", to_pil(picture), 832))

        learned = pretrain(model, clip, samples, recipe, Keeping(states_folder()), precision(clip),
                           recompute=memory_is_short(model, batch_size // accumulation),
                           bf16=computes_in_bf16(model), watch=watch, accumulation=accumulation,
                           look=Look(vae, show, preview_cfg))
        path = domain.save(learned, domains_folder(), file, overwrite=True)
        said = f"Saved: choose {file}{domain.ENDING} in Load E4T Domain."
        if samples.unreadable:
            said += f" Pictures that could not be used and were left out: {samples.unreadable}; the log says why."
        return io.NodeOutput(domain.load(path), drawn[0][None], ui=shown(said))
