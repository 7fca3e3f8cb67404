"""Load E4T Domain, and its offsets on a model."""

from comfy_api.latest import io

from ..e4t import domain
from ..e4t.domain import Domain as DomainValue
from ..e4t.use import apply_offsets
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
    def fingerprint_inputs(cls, name: str | None) -> str:
        """A file that was written anew is read anew, unless its name is linked: the host does not tell it then."""
        if not name:
            return ""
        path = file_path(DOMAINS, name)
        return f"{path} {path.stat().st_mtime_ns}"

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        loaded = domain.load(file_path(DOMAINS, name))
        return io.NodeOutput(loaded, loaded.word)


class ConceptsApplyDomain(io.ComfyNode):
    """Gives a model the weight offsets of a domain."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptsApplyDomain",
            display_name="Apply E4T Domain",
            category="concepts/apply",
            description=(
                "Turns a model towards the things of a domain, with the weight offsets that pretraining learned beside "
                "the encoder. Optional: a concept of Tune E4T needs them no more. LoRAs before or behind work as ever."
            ),
            search_aliases=["e4t", "weight offsets", "apply domain"],
            inputs=[
                io.Model.Input("model", tooltip="The checkpoint. It stays as it is."),
                Domain.Input("domain", tooltip="What was pretrained, from Load E4T Domain."),
                io.Float.Input("strength", default=1.0, min=-2.0, max=3.0, step=0.05, tooltip=(
                    "1 is the offsets as learned, 0 does nothing."
                )),
            ],
            outputs=[io.Model.Output("model", display_name="model", tooltip="The checkpoint with the offsets.")],
        )

    @classmethod
    def execute(cls, model, domain: DomainValue, strength: float) -> io.NodeOutput:
        return io.NodeOutput(apply_offsets(model, domain, strength))
