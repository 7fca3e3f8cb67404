"""Inspect Concept."""

from comfy_api.latest import io, ui

from ..textual_inversion.concept import Concept as ConceptValue
from ..textual_inversion.inspection import report
from .sockets import Concept


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
            ],
            outputs=[io.String.Output("report", display_name="report", tooltip="What the node shows, as text.")],
        )

    @classmethod
    def execute(cls, concept: ConceptValue, clip) -> io.NodeOutput:
        if clip is None:
            raise ValueError("This checkpoint file has no text encoder (CLIP); load one and connect it to 'clip'.")
        page = report(clip, concept)
        return io.NodeOutput(page, ui=ui.PreviewText(page))
