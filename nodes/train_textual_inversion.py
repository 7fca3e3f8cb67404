"""Train Textual Inversion."""

from comfy_api.latest import io

from ..textual_inversion.train import Recipe, learn_word
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

PRESETS = {  # the rate is in root mean squares of the class word's numbers
    "balanced": {"steps": 400, "rate": 0.3, "batch_size": 4},
    "quick": {"steps": 100, "rate": 0.6, "batch_size": 4},
    "thorough": {"steps": 1500, "rate": 0.3, "batch_size": 4},
}


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
                "next nodes and is kept in output/concepts; press it again to stop those too. Queue again and it goes "
                "on where it stopped."
            ),
            search_aliases=["textual inversion", "TI", "embedding", "train embedding", "learn word", "dreambooth",
                            "personalization", "concept"],
            is_input_list=True,
            inputs=[
                *what_to_learn(),
                how_long(PRESETS, pace(steps=300, learning_rate=0.01)),
                chosen_seed(),
                io.Int.Input("vectors", default=1, min=1, max=16, advanced=True, tooltip=(
                    "How many token places the word takes in the prompt. More hold more detail and push the rest of "
                    "the prompt aside."
                )),
                *how_to_look(),
                io.Float.Input("keep_length", default=0.0, min=0.0, max=1.0, step=0.01, advanced=True, tooltip=(
                    "How strongly the vectors are drawn back to the length of the init text's after each step. 0 lets "
                    "them grow: closer to the photos. Higher: obeys the prompt more."
                )),
                *how_to_run(),
                own_masks(optional=True),
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
            return recipe, learn_word(one["model"], one["clip"], one["vae"], photos, recipe, *how)

        return run(cls, inputs, learn)


def pace_of(name: str, clip, init_text: str) -> dict:
    """The pace of a preset for a word that starts from `init_text` in this CLIP."""
    return word_rate(PRESETS[name], clip, init_text)


def read_recipe(one: dict, pace: dict) -> Recipe:
    """The widgets as a recipe. Raises ValueError with one sentence for values that cannot be trained with."""
    return Recipe(vectors=one["vectors"], norm_pull=one["keep_length"], **common_recipe(one, pace))
