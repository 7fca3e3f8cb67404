"""Apply Concept."""

from comfy_api.latest import io

from ..textual_inversion.apply import apply_words
from ..textual_inversion.concept import Concept as ConceptValue
from .sockets import Concept


class ConceptsApply(io.ComfyNode):
    """Gives a model and its CLIP a concept."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptsApply",
            display_name="Apply Concept",
            category="concepts/apply",
            description=(
                "Makes a concept available to the prompts behind it: write its placeholder, such as <mine>, in CLIP "
                "Text Encode. Chain several like LoRA loaders. The model and CLIP that come in stay as they are."
            ),
            search_aliases=["use embedding", "apply textual inversion", "learned word", "concept loader"],
            inputs=[
                io.Model.Input("model", tooltip="The checkpoint. A learned word leaves it as it is."),
                io.Clip.Input("clip", tooltip="The text encoder that is to understand the word."),
                Concept.Input("concept", tooltip="What was learned, from a training or from Load Concept."),
                io.Float.Input("strength", default=1.0, min=-2.0, max=3.0, step=0.05, tooltip=(
                    "1 is the word as learned. Towards 0 it nears the plain class word, above 1 it goes further. At "
                    "exactly 0 the node does nothing and the placeholder is just text."
                )),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="The checkpoint with the concept."),
                io.Clip.Output("clip", display_name="clip", tooltip=(
                    "The text encoder with the word, for CLIP Text Encode."
                )),
            ],
        )

    @classmethod
    def execute(cls, model, clip, concept: ConceptValue, strength: float) -> io.NodeOutput:
        if clip is None:
            raise ValueError("This checkpoint file has no text encoder (CLIP); load one and connect it to 'clip'.")
        return io.NodeOutput(model, apply_words(clip, concept, strength))
