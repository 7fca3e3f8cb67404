"""Inspect Concept."""

from comfy_api.latest import io, ui

from ..e4t.difference import Difference
from ..host.progress import shown
from ..perfusion.apply import BIAS
from ..perfusion.concept import Edit
from ..perfusion.inspection import gate_bars, gates
from ..textual_inversion.concept import Concept as ConceptValue
from ..textual_inversion.inspection import report
from ..training.preview import to_tensor
from .sockets import Concept, require_clip

KINDS = {type(None): "learned word", Edit: "Perfusion concept", Difference: "tuned model (E4T)"}


class ConceptsInspect(io.ComfyNode):
    """Tells what a concept is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptsInspect",
            display_name="Inspect Concept",
            category="concepts/io",
            description=(
                "Tells what a concept holds: for which text encoders, how long its vectors are beside those of "
                "ordinary words, which words lie nearest, and how it was trained. A word much longer than ordinary "
                "ones tends to drown out the rest of a prompt."
            ),
            search_aliases=["embedding info", "nearest words", "concept info", "metadata"],
            is_output_node=True,
            inputs=[
                Concept.Input("concept", tooltip="What to look at, from a training or from Load Concept."),
                io.Clip.Input("clip", tooltip="The text encoder it was learned for, whose words it is compared with."),
                io.String.Input("prompt", default="a photo of a {} in the snow", optional=True, tooltip=(
                    "For a Perfusion concept: a prompt, {} where its word goes. The picture shows how far the concept "
                    "is switched on at each token."
                )),
                io.Float.Input("bias", default=BIAS, min=-1.0, max=2.0, step=0.01, optional=True, tooltip=(
                    "The bias that the picture is drawn for, as in Apply Concept."
                )),
            ],
            outputs=[
                io.String.Output("report", display_name="report", tooltip="What the node shows, as text."),
                io.Image.Output("gates", display_name="gates", tooltip=(
                    "Which words of the prompt a Perfusion concept touches; for any other it only says so."
                )),
            ],
        )

    @classmethod
    def execute(cls, concept: ConceptValue, clip, prompt: str = "{}", bias: float = BIAS) -> io.NodeOutput:
        require_clip(clip)
        page = f"{KINDS[type(concept.edit)]}\n{report(clip, concept)}"
        if not isinstance(concept.edit, Edit):
            told = to_tensor(gate_bars([], "Only Perfusion concepts have gates."))
            return io.NodeOutput(page, told, ui=shown(page))
        text = prompt.replace("{}", concept.words[0].placeholder)
        picture = to_tensor(gate_bars(gates(clip, concept, text, bias), f"gates at bias {bias:g}"))
        return io.NodeOutput(page, picture, ui=shown(page).as_dict() | ui.PreviewImage(picture, cls=cls).as_dict())
