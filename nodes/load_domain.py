"""Load E4T Domain."""

from comfy_api.latest import io

from ..e4t import domain
from ..host.folders import DOMAINS, file_names, file_path
from .sockets import Domain


class ConceptsLoadDomain(io.ComfyNode):
    """Reads what was pretrained of a class of things."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptsLoadDomain",
            display_name="Load E4T Domain",
            category="concepts/io",
            description=(
                "Loads an encoder that was pretrained on one class of things, such as teddies, from models/e4t. Tune "
                "E4T makes a concept of a single picture with it."
            ),
            search_aliases=["e4t", "encoder for tuning", "load encoder"],
            inputs=[
                io.Combo.Input("name", options=file_names(DOMAINS, (domain.ENDING,)), tooltip=(
                    "A domain file in models/e4t. 'teddy' comes with the pack, for the sample model."
                )),
            ],
            outputs=[
                Domain.Output("domain", display_name="domain", tooltip="The encoder, for Tune E4T."),
                io.String.Output("class_word", display_name="class word", tooltip="What the domain is of."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str) -> str:
        """A file that was written anew is read anew."""
        path = file_path(DOMAINS, name)
        return f"{path} {path.stat().st_mtime_ns}"

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        loaded = domain.load(file_path(DOMAINS, name))
        return io.NodeOutput(loaded, loaded.word)
