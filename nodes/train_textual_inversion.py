"""Train Textual Inversion."""

import json
from collections import Counter
from math import isfinite

import numpy as np
import torch
from comfy_api.latest import io

from ..host.text import is_ordinary_word
from ..textual_inversion.templates import BY_KIND, sentences
from ..textual_inversion.train import Preview, Recipe, learn_word
from ..textual_inversion.word import check_placeholder
from .sockets import Concept

_stopped: Counter[str] = Counter()


class ConceptsTrainTextualInversion(io.ComfyNode):
    """Learns a word from photos."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptsTrainTextualInversion",
            display_name="Train Textual Inversion",
            category="concepts/train",
            description=(
                "Learns a new word from a few photos of one thing. Nothing in the checkpoint changes: what is learned "
                "are the numbers behind the word. Press Cancel to stop early: the word learned so far goes on to the "
                "next nodes and is kept in output/concepts; press it again to stop those too. Queueing again trains "
                "again."
            ),
            search_aliases=["textual inversion", "TI", "embedding", "train embedding", "learn word", "dreambooth",
                            "personalization", "concept"],
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip=(
                    "The checkpoint to learn for: Stable Diffusion 1.x, 2.x or SDXL. LoRAs on it count."
                )),
                io.Clip.Input("clip", tooltip=(
                    "The checkpoint's text encoder. The new word is learned for this encoder."
                )),
                io.Vae.Input("vae", tooltip="The checkpoint's VAE. Photos are encoded once, before the first step."),
                io.Image.Input("images", tooltip=(
                    "Three to ten photos of the thing, in different places and from different sides, the thing large "
                    "in each. A batch, or a list of any sizes; the middle square of each is used."
                )),
                io.String.Input("init_text", default="", placeholder="class word, such as: cat", tooltip=(
                    "The ordinary word or words that come closest, such as 'cat' or 'teapot'. Learning starts there; "
                    "the closer, the sooner it is done."
                )),
                io.String.Input("placeholder", default="<mine>", tooltip=(
                    "The word that prompts will use for it, such as <mine>. One word; in angle brackets it can never "
                    "be mistaken for another."
                )),
                io.Int.Input("steps", default=500, min=1, max=100000, tooltip=(
                    "How many times the word is improved. A few hundred usually do; with more it copies the photos "
                    "more closely and obeys the rest of the prompt less."
                )),
                io.Float.Input("learning_rate", default=0.005, min=0.0, max=1.0, step=0.0001, round=0.000001, tooltip=(
                    "How far each step moves. Higher learns faster and forgets the class word sooner. It falls to a "
                    "tenth towards the end."
                )),
                io.Int.Input("batch_size", default=4, min=1, max=64, tooltip=(
                    "How many noisy photos each step looks at. More makes steadier steps and needs more memory and "
                    "time."
                )),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True, tooltip=(
                    "Decides noise, order and sentences. The same seed and photos give the same file, byte for byte."
                )),
                io.Int.Input("vectors", default=1, min=1, max=16, advanced=True, tooltip=(
                    "How many token places the word takes in the prompt. More hold more detail and push the rest of "
                    "the prompt aside."
                )),
                io.Combo.Input("sentences", options=list(BY_KIND), default="object", advanced=True, tooltip=(
                    "The kind of sentences the word is learned in: 'object' for things and beings, 'style' for a look."
                )),
                io.String.Input("own_sentences", default="", multiline=True, advanced=True,
                                placeholder="your own sentences, one per line: a photo of {} on a table", tooltip=(
                    "Your own sentences instead, one per line, {} where the word goes. What they say besides the word "
                    "is not learned into the word, so name backgrounds that all photos share."
                )),
                io.Int.Input("resolution", default=0, min=0, max=2048, step=64, advanced=True, tooltip=(
                    "Side of the training square in pixels. 0 takes the photos' own size, up to 512."
                )),
                io.Boolean.Input("mirror", default=False, advanced=True, tooltip=(
                    "Also learn from mirrored photos. Off for anything with lettering or whose left and right differ."
                )),
                io.Float.Input("keep_length", default=0.0, min=0.0, max=1.0, step=0.01, advanced=True, tooltip=(
                    "How strongly the vectors are drawn back to the length of the init text's after each step. 0 lets "
                    "them grow: closer to the photos. Higher: obeys the prompt more."
                )),
                io.Int.Input("preview_every", default=100, min=0, max=100000, advanced=True, tooltip=(
                    "A sample picture is drawn every so many steps. 0 draws only the first and the last."
                )),
                io.String.Input("preview_prompt", default="a photo of a {}", advanced=True, tooltip=(
                    "What the sample pictures show; {} is where the word goes."
                )),
                io.Float.Input("preview_cfg", default=7.0, min=1.0, max=30.0, step=0.1, advanced=True, tooltip=(
                    "How closely the sample pictures follow their prompt, as in KSampler. Does not affect what is "
                    "learned."
                )),
                io.Int.Input("preview_steps", default=20, min=1, max=200, advanced=True, tooltip=(
                    "Sampling steps of each sample picture. Does not affect what is learned."
                )),
            ],
            outputs=[
                Concept.Output("concept", display_name="concept", tooltip=(
                    "The learned word, for Save Concept and Apply Concept."
                )),
                io.LossMap.Output("loss_map", display_name="loss_map", tooltip=(
                    "The loss of every step, for ComfyUI's Plot Loss Graph."
                )),
                io.Image.Output("sample_sheet", display_name="sample sheet", tooltip=(
                    "One page to judge the training by: photos, samples from first to last, loss curve."
                )),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs) -> str:
        """A training that was cancelled is not taken from the cache when it is queued again."""
        return str(_stopped[_widgets(inputs)])

    @classmethod
    def execute(cls, **inputs) -> io.NodeOutput:
        images = inputs["images"]
        one = {name: values[0] for name, values in inputs.items()}
        check_sockets(one)
        recipe, view = read_recipe(one), read_preview(one)
        lesson = learn_word(one["model"], one["clip"], one["vae"], images, recipe, view)
        if len(lesson.losses) < recipe.steps:
            _stopped[_widgets(inputs)] += 1
        page = torch.from_numpy(np.asarray(lesson.sheet, dtype=np.float32) / 255)[None]
        return io.NodeOutput(lesson.concept, {"loss": lesson.losses}, page)


def check_sockets(one: dict) -> None:
    """Raises ValueError for a checkpoint that came without a part, or a placeholder that its encoder knows."""
    for name, part in (("model", "diffusion model"), ("clip", "text encoder (CLIP)"), ("vae", "VAE")):
        if one[name] is None:
            raise ValueError(f"This checkpoint file has no {part}; load one and connect it to {name!r}.")
    check_placeholder(one["placeholder"].strip())
    if is_ordinary_word(one["clip"], one["placeholder"].strip()):
        raise ValueError(
            f"{one['placeholder'].strip()!r} is a word the text encoder already knows; use one that is not, "
            f"such as <{one['placeholder'].strip()}>."
        )


def read_recipe(one: dict) -> Recipe:
    """The widgets as a recipe. Raises ValueError with one sentence for values that cannot be trained with."""
    if not one["init_text"].strip():
        raise ValueError("The init text is empty; write the ordinary word that comes closest, such as 'cat'.")
    if not isfinite(one["learning_rate"]) or one["learning_rate"] <= 0:
        raise ValueError(f"The learning rate must be a number above 0, such as 0.005; it is {one['learning_rate']}.")
    return Recipe(
        placeholder=one["placeholder"].strip(),
        init_text=one["init_text"].strip(),
        steps=one["steps"],
        learning_rate=one["learning_rate"],
        batch_size=one["batch_size"],
        seed=one["seed"],
        vectors=one["vectors"],
        sentences=sentences(one["sentences"], one["own_sentences"]),
        norm_pull=one["keep_length"],
        resolution=one["resolution"],
        mirror=one["mirror"],
    )


def read_preview(one: dict) -> Preview:
    """The widgets that only decide what is shown."""
    return Preview(one["preview_every"], one["preview_prompt"], one["preview_cfg"], one["preview_steps"])


def _widgets(inputs: dict) -> str:
    values = {name: v[0] for name, v in inputs.items() if v and isinstance(v[0], str | int | float)}
    return json.dumps(values, sort_keys=True)
