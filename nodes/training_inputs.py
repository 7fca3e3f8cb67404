"""The inputs and outputs that training nodes have in common, and how they are read."""

from collections.abc import Callable, Iterable
from math import isfinite
from typing import Any

from comfy_api.latest import io

from ..host.bases import base_name, check_pair
from ..host.pictures import is_empty
from ..host.progress import shown, warned
from ..host.text import is_ordinary_word, ready, rows
from ..textual_inversion.templates import BY_KIND, sentences
from ..textual_inversion.train import Keeping, Lesson, Preview, Recipe
from ..textual_inversion.word import check_placeholder, row_size
from ..training.dataset import Photo, gather
from ..training.optimisers import OPTIMISERS, SCHEDULES
from ..training.preview import to_tensor
from .sockets import Concept

OWN = "own settings"
LONGEST_PLACEHOLDER = 64  # it also names files
_stopped: list[tuple[str | None, dict[str, str | int | float]]] = []


SEVERAL = "Three to ten photos of the thing, in different places and from different sides"


def what_to_learn(which: str = SEVERAL) -> list[io.Input]:
    """Checkpoint, photos and the word; `which` photos are wanted."""
    return [
        io.Model.Input("model", tooltip=(
            "The checkpoint to learn for: Stable Diffusion 1.x, 2.x or SDXL. LoRAs on it count."
        )),
        io.Clip.Input("clip", tooltip=(
            "The checkpoint's text encoder. The new word is learned for this encoder."
        )),
        io.Vae.Input("vae", tooltip="The checkpoint's VAE. Photos are encoded once, before the first step."),
        io.Image.Input("images", tooltip=(
            f"{which}, the thing large in each. A batch, or a list of any sizes; the middle square of each is used, or "
            "the square around its mask."
        )),
        io.Mask.Input("masks", optional=True, tooltip=(
            "Where the thing is, 1 on it, one mask for each photo: the rest then counts far less. A mask "
            "painted over the thing in the MaskEditor is right as it is; for a picture whose background is transparent "
            "put Invert Mask behind Load Image."
        )),
        io.String.Input("captions", optional=True, force_input=True, tooltip=(
            "What each photo shows, one text for each, as dataset loaders give them. The word takes the place "
            "of {} or of the init text in it. Without a caption a photo gets the sentences below."
        )),
        io.String.Input("init_text", default="", placeholder="class word, such as: cat", tooltip=(
            "The ordinary word or words that come closest, such as 'cat' or 'teapot'. Learning starts there; "
            "the closer, the sooner it is done."
        )),
        io.String.Input("placeholder", default="<mine>", tooltip=(
            "The word that prompts will use for it, such as <mine>. One word; in angle brackets it can never "
            "be mistaken for another."
        )),
    ]


def how_long(presets: Iterable[str], own: list[io.Input]) -> io.Input:
    """The choice of a preset, or of the widgets `own`."""
    return io.DynamicCombo.Input("preset", options=[
        *(io.DynamicCombo.Option(name, []) for name in presets),
        io.DynamicCombo.Option(OWN, own),
    ], tooltip=(
        "How long and how fast to learn: 'quick' is for a first look and all that the sample world needs, 'balanced' "
        "for three to ten photos, 'thorough' for when the samples were still getting better at its end. 'own "
        "settings' takes your own numbers instead of a preset's."
    ))


def own_masks(optional: bool = False) -> io.Input:
    """Whether the thing is looked for in photos without a mask."""
    return io.Boolean.Input("own_masks", default=True, advanced=True, optional=optional, tooltip=(
        "In photos without a mask, find the thing by where the init text makes the model look and changes what it "
        "draws, so that backgrounds are not learned. A style has none."
    ))


def chosen_seed() -> io.Input:
    """What decides everything random."""
    return io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF,
                        control_after_generate=io.ControlAfterGenerate.fixed, tooltip=(
        "Decides noise, order and sentences. The same seed and photos give the same file, byte for byte on a processor "
        "and nearly the same on a graphics card."
    ))


def how_to_look() -> list[io.Input]:
    """Sentences, views of the photos, weights of the loss."""
    return [
        io.Combo.Input("sentences", options=list(BY_KIND), default="object", advanced=True, tooltip=(
            "The kind of sentences the word is learned in: 'object' for things and beings, 'style' for a look, 'object "
            "in places' also names places that the photos do not show, which only suits training with masks."
        )),
        io.String.Input("own_sentences", default="", multiline=True, advanced=True,
                        placeholder="your own sentences, one per line: a photo of {} on a table", tooltip=(
            "Your own sentences instead, one per line, {} where the word goes. What they say besides the word "
            "is not learned into the word, so name backgrounds that all photos share."
        )),
        io.Int.Input("resolution", default=0, min=0, max=2048, step=64, advanced=True, tooltip=(
            "Side of the training square in pixels. 0 takes the photos' own size, up to what the checkpoint was made "
            "for: 512 for Stable Diffusion 1.x and 2.x, 768 for 2.x with v-prediction, 1024 for SDXL."
        )),
        io.Boolean.Input("mirror", default=False, advanced=True, tooltip=(
            "Also learn from mirrored photos. Off for anything with lettering or whose left and right differ."
        )),
        io.Int.Input("crops", default=0, min=0, max=16, advanced=True, tooltip=(
            "Also learn from so many random crops of each photo, three quarters of it or more. For photos "
            "that are all framed alike."
        )),
        io.Float.Input("mask_floor", default=0.1, min=0.0, max=1.0, step=0.01, advanced=True, tooltip=(
            "How much the photo outside its mask counts. Above 0 the word also learns how the thing meets "
            "its surroundings. Without masks it only counts where the node finds the thing by itself."
        )),
        io.Float.Input("snr_cap", default=0.0, min=0.0, max=100.0, step=0.5, advanced=True, tooltip=(
            "Min-SNR weighting: bounds how much nearly clean pictures count. 5 is usual, 0 turns it off."
        )),
    ]


def how_to_run() -> list[io.Input]:
    """Memory, states and previews."""
    return [
        io.Combo.Input("save_memory", options=["auto", "on", "off"], default="auto", advanced=True, tooltip=(
            "Compute parts of the model twice instead of keeping them (gradient checkpointing): about half "
            "the memory, a third slower. 'auto' does so on cards with less than 20 GB for four pictures a step "
            "on Stable Diffusion 1.x, or 40 GB for eight, and on any that is not far larger for SDXL."
        )),
        io.Int.Input("save_every", default=100, min=0, max=100000, advanced=True, tooltip=(
            "Keeps a state on disk every so many steps, from which the training goes on after a crash or "
            "Cancel. 0 keeps none."
        )),
        io.Int.Input("keep_states", default=2, min=1, max=100, advanced=True, tooltip=(
            "How many of the newest states to keep. A training that is done removes its own."
        )),
        io.Boolean.Input("resume", default=True, advanced=True, tooltip=(
            "Go on from the newest state when the very same training was stopped before. Off starts anew."
        )),
        io.Int.Input("preview_every", default=100, min=0, max=100000, advanced=True, tooltip=(
            "A sample picture is drawn every so many steps. 0 draws only the first and the last."
        )),
        io.String.Input("preview_prompt", default="a photo of a {}", advanced=True, tooltip=(
            "What the sample pictures show, {} where the word goes. Without it the word goes where the class word "
            "stands, or in front."
        )),
        io.Float.Input("preview_cfg", default=7.0, min=1.0, max=30.0, step=0.1, advanced=True, tooltip=(
            "How closely the sample pictures follow their prompt, as in KSampler. Does not affect what is "
            "learned."
        )),
        io.Int.Input("preview_steps", default=20, min=1, max=200, advanced=True, tooltip=(
            "Sampling steps of each sample picture. Does not affect what is learned."
        )),
    ]


def pace(steps: int, learning_rate: float) -> list[io.Input]:
    """What 'own settings' shows."""
    return [
        io.Int.Input("steps", default=steps, min=1, max=100000, tooltip=(
            "How many times the word is improved. A few hundred usually do; with more it copies the photos "
            "more closely and obeys the rest of the prompt less."
        )),
        io.Float.Input("learning_rate", default=learning_rate, min=0.0, max=1.0, step=0.0001, round=0.000001, tooltip=(
            "How far each step moves. Higher learns faster and forgets the class word sooner. It falls to a "
            "tenth towards the end."
        )),
        io.Int.Input("batch_size", default=4, min=1, max=64, tooltip=(
            "How many noisy photos each step looks at. More makes steadier steps and needs more memory and "
            "time."
        )),
        io.Int.Input("accumulation", default=1, min=1, max=64, tooltip=(
            "How many batches make one step. A batch of 1 four times learns like a batch of 4, in the memory of 1."
        )),
        io.Combo.Input("schedule", options=list(SCHEDULES), default="cosine", tooltip=(
            "How the learning rate falls to a tenth towards the end, or that it does not."
        )),
        io.Int.Input("warmup", default=0, min=0, max=10000, tooltip=(
            "Over how many steps the learning rate rises at the start."
        )),
        io.Combo.Input("optimiser", options=list(OPTIMISERS), default="AdamW", tooltip=(
            "What turns gradients into moves. AdamW suits nearly everything; SGD needs far higher rates."
        )),
    ]


def outputs() -> list[io.Output]:
    """What a training gives."""
    return [
        Concept.Output("concept", display_name="concept", tooltip=(
            "What was learned, for Save Concept and Apply Concept."
        )),
        io.LossMap.Output("loss_map", display_name="loss_map", tooltip=(
            "The loss of every step, for ComfyUI's Plot Loss Graph."
        )),
        io.Image.Output("sample_sheet", display_name="sample sheet", tooltip=(
            "One page to judge the training by: photos, samples from first to last, loss curve."
        )),
    ]


def check_sockets(one: dict) -> None:
    """Raises ValueError for a checkpoint that lacks a part or cannot be trained on, or an unfit placeholder."""
    for name, part in (("model", "diffusion model"), ("clip", "text encoder (CLIP)"), ("vae", "VAE")):
        if one[name] is None or name == "vae" and is_empty(one[name]):
            raise ValueError(f"This checkpoint file has no {part}; load one and connect it to {name!r}.")
    base_name(one["model"])
    check_pair(one["model"], one["clip"])
    check_placeholder(one["placeholder"].strip())
    if len(one["placeholder"].strip()) > LONGEST_PLACEHOLDER:
        raise ValueError(f"The placeholder has {len(one['placeholder'].strip())} characters; "
                         f"at most {LONGEST_PLACEHOLDER} can be used.")
    if is_ordinary_word(one["clip"], one["placeholder"].strip()):
        raise ValueError(
            f"{one['placeholder'].strip()!r} is a word the text encoder already knows; use one that is not, "
            f"such as <{one['placeholder'].strip()}>."
        )


def chosen_pace(chosen: dict, one: dict, pace_of: Callable[[str, Any, str], dict]) -> dict:
    """The pace of the chosen preset by `pace_of(preset, clip, init text)`, or the widgets that 'own settings' shows."""
    values = {name: value[0] for name, value in chosen.items()}
    name = values.pop("preset")
    return values if name == OWN else pace_of(name, one["clip"], one["init_text"].strip())


def word_rate(preset: dict, clip, init_text: str) -> dict:
    """Steps, batch size and learning rate of a preset whose rate is in root mean squares of the class word's numbers.

    Encoders differ fivefold in these.
    """
    size = max(row_size(found) for found in rows(ready(clip), init_text).values())
    return {"steps": preset["steps"], "batch_size": preset["batch_size"], "learning_rate": preset["rate"] * size}


def common_recipe(one: dict, pace: dict) -> dict[str, Any]:
    """The widgets of these inputs as fields of a recipe, with steps, rates and batch size from `pace`.

    Raises ValueError with one sentence for values that cannot be trained with.
    """
    if not one["init_text"].strip():
        raise ValueError("The init text is empty; write the ordinary word that comes closest, such as 'cat'.")
    if not isfinite(pace["learning_rate"]) or pace["learning_rate"] <= 0:
        raise ValueError(f"The learning rate must be a number above 0, such as 0.01; it is {pace['learning_rate']}.")
    return {
        "placeholder": one["placeholder"].strip(),
        "init_text": one["init_text"].strip(),
        "seed": one["seed"],
        "sentences": sentences(one["sentences"], one["own_sentences"]),
        **{name: one[name] for name in ("snr_cap", "mask_floor", "resolution", "mirror", "crops")},
        "own_masks": one.get("own_masks", True) and one["sentences"] != "style",
        **pace,
    }


Learn = Callable[[dict, list[Photo], Preview, Keeping, bool | None], tuple[Recipe, Lesson]]


def run(node: type[io.ComfyNode], inputs: dict, learn: Learn) -> io.NodeOutput:
    """Reads the inputs of `node`, lets `learn` train on them, and gives the outputs."""
    photos = gather(inputs["images"], *([item for item in inputs.get(name) or () if item is not None]
                                        for name in ("masks", "captions")))
    one = {name: values[0] for name, values in inputs.items() if isinstance(values, list) and values}
    check_sockets(one)
    view = Preview(one["preview_every"], one["preview_prompt"], one["preview_cfg"], one["preview_steps"])
    keeping = Keeping(one["save_every"], one["keep_states"], one["resume"])
    recompute = {"on": True, "off": False, "auto": None}[one["save_memory"]]
    with warned() as sentences:
        recipe, lesson = learn(one, photos, view, keeping, recompute)
    if len(lesson.losses) < recipe.steps:
        _stopped.append((_place(node), _widgets(inputs)))
    return io.NodeOutput(lesson.concept, {"loss": lesson.losses}, to_tensor(lesson.sheet),
                         ui=shown("\n".join(sentences)) if sentences else None)


def stops(node: type[io.ComfyNode], inputs: dict) -> str:
    """Changes whenever this node's training with these widgets was cancelled, so that it is not taken from the cache
    then."""
    known = _widgets(inputs).items()
    return str(sum(place == _place(node) and known <= stopped.items() for place, stopped in _stopped))


def _place(node: type[io.ComfyNode]) -> str | None:
    """The id of the node in its graph."""
    return getattr(node.hidden, "unique_id", None)


def _widgets(inputs: dict) -> dict[str, str | int | float]:
    """The values of all widgets; of linked ones only while the node runs, the host gives (None,) for them before."""
    given = inputs | inputs.get("preset", {})
    firsts = {name: v[0] for name, v in given.items() if isinstance(v, list) and v}
    return {name: value for name, value in firsts.items() if isinstance(value, str | int | float)}
