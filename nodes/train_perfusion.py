"""Train Perfusion Concept."""

from functools import partial
from math import isfinite

from comfy_api.latest import io

from ..host.text import fingerprint_of
from ..perfusion.covariance import corpus_name, precision
from ..perfusion.train import EditMethod, EditRecipe
from ..textual_inversion.train import learn_word
from .training_inputs import (
    chosen_pace,
    chosen_seed,
    common_recipe,
    how_long,
    how_to_look,
    how_to_run,
    outputs,
    own_masks,
    pace,
    run,
    stops,
    what_to_learn,
    word_rate,
)

PRESETS = {  # rates are in root mean squares of what they move: the class word's numbers, its values in each layer
    "balanced": {"steps": 400, "rate": 0.2, "value_rate": 0.08, "batch_size": 4},
    "quick": {"steps": 150, "rate": 0.4, "value_rate": 0.15, "batch_size": 4},
    "thorough": {"steps": 1000, "rate": 0.2, "value_rate": 0.08, "batch_size": 4},
}


class ConceptsTrainPerfusion(io.ComfyNode):
    """Learns a word and a key-locked edit from photos."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptsTrainPerfusion",
            display_name="Train Perfusion Concept",
            category="concepts/train",
            description=(
                "Learns a concept from a few photos of one thing: a new word, and what the model should draw for it. "
                "It keeps to the class word in where it looks, so prompts stay in charge, and it is a file of about "
                "30 KB for SD1.5, 180 KB for SDXL. Several fit in one picture, and the bias of Apply Concept moves "
                "each between looking most like the photos and doing exactly what the prompt says, without "
                "training again."
            ),
            search_aliases=["perfusion", "key-locked", "rank-1", "rank one editing", "dreambooth", "personalization",
                            "train concept", "concept"],
            is_input_list=True,
            inputs=[
                *what_to_learn(),
                how_long(PRESETS, [
                    *pace(steps=400, learning_rate=0.006),
                    io.Float.Input("value_rate", default=0.03, min=0.0, max=1.0, step=0.0001, round=0.000001, tooltip=(
                        "How far each step moves what the layers draw for the word. The learning rate above moves the "
                        "word itself."
                    )),
                ]),
                chosen_seed(),
                *how_to_look(),
                own_masks(),
                io.Float.Input("training_bias", default=0.65, min=0.0, max=1.5, step=0.01, advanced=True, tooltip=(
                    "How much like the concept a word must be for the edit to act on it while learning, a quarter up "
                    "or down at each step. Higher keeps the concept more to its own word."
                )),
                io.Float.Input("training_temperature", default=0.1, min=0.01, max=1.0, step=0.01, advanced=True,
                               tooltip="How gradually the edit sets in around that, while learning."),
                io.Float.Input("momentum", default=0.9, min=0.0, max=0.999, step=0.001, round=0.0001, advanced=True,
                               tooltip=(
                    "How slowly the edit's target follows the word while it is learned; 0.99 in the paper."
                )),
                io.Boolean.Input("train_keys", default=False, advanced=True, tooltip=(
                    "Also learn where the word attracts attention, instead of locking it to the class word: looks a "
                    "little more like the photos and obeys prompts less."
                )),
                *how_to_run(),
                io.String.Input("corpus", default="", multiline=True, optional=True, advanced=True, tooltip=(
                    "Captions of your own, one a line, to measure the text encoder on instead of those of the pack: "
                    "for a model that reads a language or a kind of prompt of its own. The more the better, thousands."
                )),
            ],
            outputs=outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs) -> str:
        """A training that was cancelled is not taken from the cache when it is queued again."""
        return stops(cls, inputs)

    @classmethod
    def execute(cls, **inputs) -> io.NodeOutput:
        def learn(one, photos, *how):
            recipe = read_recipe(one, chosen_pace(inputs["preset"], one, pace_of))
            metric = precision(one["clip"], one.get("corpus", ""))
            method = partial(EditMethod, metric, fingerprint_of(one["clip"]))
            return recipe, learn_word(one["model"], one["clip"], one["vae"], photos, recipe, *how, method)

        return run(cls, inputs, learn)


def pace_of(name: str, clip, init_text: str) -> dict:
    """The pace of a preset for a concept that starts from `init_text` in this CLIP."""
    values = {"value_rate": PRESETS[name]["value_rate"], "relative_values": True}
    return word_rate(PRESETS[name], clip, init_text) | values


def read_recipe(one: dict, pace: dict) -> EditRecipe:
    """The widgets as a recipe. Raises ValueError with one sentence for values that cannot be trained with."""
    if not isfinite(pace["value_rate"]) or pace["value_rate"] <= 0:
        raise ValueError(f"The value rate must be a number above 0, such as 0.03; it is {pace['value_rate']}.")
    return EditRecipe(
        bias=one["training_bias"],
        temperature=one["training_temperature"],
        corpus=corpus_name(one.get("corpus", "")),
        **{name: one[name] for name in ("momentum", "train_keys")},
        **common_recipe(one, pace),
    )
