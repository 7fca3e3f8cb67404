"""Inline Concept."""

from comfy_api.latest import io

from ..host.progress import shown
from ..perfusion.inline import describe, from_text, to_text
from .applying import require_no_difference
from .sockets import Concept


class ConceptsInline(io.ComfyNode):
    """Holds a concept as text inside the workflow."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptsInline",
            display_name="Inline Concept",
            category="concepts/io",
            description=(
                "Keeps a concept inside the workflow, so that a shared JSON or picture brings it along. Connect a "
                "concept and queue once; then copy the text output into 'text' and disconnect. Text that is damaged "
                "is refused, and nothing in it is ever run."
            ),
            search_aliases=["embed concept", "share concept", "concept to text", "portable"],
            is_output_node=True,
            inputs=[
                io.String.Input("text", default="", multiline=True, placeholder="concept perfusion …", tooltip=(
                    "A concept as text, as this node gives it. A concept that is connected goes before."
                )),
                Concept.Input("concept", optional=True, tooltip="A concept to turn into text."),
            ],
            outputs=[
                Concept.Output("concept", display_name="concept", tooltip="The concept, for Apply Concept."),
                io.String.Output("text", display_name="text", tooltip="The concept as text, without its cover."),
            ],
        )

    @classmethod
    def execute(cls, text: str, concept=None) -> io.NodeOutput:
        if concept is None and not text.strip():
            raise ValueError("There is no concept: paste one as text, or connect one.")
        if concept is not None:
            require_no_difference(concept, "is too large for a workflow")
        concept, text = (from_text(text), text) if concept is None else (concept, to_text(concept))
        said = f"{concept.words[0].placeholder}: {describe(text.strip())}"
        return io.NodeOutput(concept, text, ui=shown(said))
