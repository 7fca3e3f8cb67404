"""Export Concept as LoRA."""

from dataclasses import replace

from comfy_api.latest import io

from ..host.cross_attention import sizes
from ..host.folders import embeddings_folder, loras_folder, unused_name
from ..host.progress import shown
from ..perfusion.file import check_fits
from ..perfusion.linear import linear_dual
from ..perfusion.lora import KEPT, to_bytes, to_lora
from ..textual_inversion.concept import Concept as ConceptValue
from ..textual_inversion.file import save
from ..training.disk import write_whole
from ..training.names import ENDINGS, checked_name, free_path
from .applying import require_no_difference
from .concept_files import NamesFile
from .sockets import Concept, require_clip


class ConceptsExportLora(NamesFile):
    """Writes a concept's edit as a LoRA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptsExportLora",
            display_name="Export Concept as LoRA",
            category="concepts/io",
            description=(
                "Saves a Perfusion concept as an ordinary LoRA of rank 1 for programs without this pack, with its word "
                "in it or beside it. A LoRA has no gate, so it has no bias either and also touches words that resemble "
                "the concept's."
            ),
            search_aliases=["save lora", "bake concept", "perfusion to lora"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="A checkpoint of the base that the concept was learned on."),
                io.Clip.Input("clip", tooltip="Its text encoder."),
                Concept.Input("concept", tooltip="A Perfusion concept, from a training or from Load Concept."),
                io.String.Input("name", default="mine", tooltip="The file's name in models/loras."),
                io.Float.Input("strength", default=1.0, min=-2.0, max=3.0, step=0.05, tooltip=(
                    "How strong the LoRA is when it is loaded at strength 1."
                )),
                io.Boolean.Input("overwrite", default=False, tooltip=(
                    "Replace a file of that name. When off, a name that is taken gets a number: mine_2, then mine_3."
                )),
                io.Boolean.Input("bundle", default=True, optional=True, tooltip=(
                    "Put the word into the LoRA, as A1111 and its kin read it. Diffusers refuses such a file: turn it "
                    "off for that, and the word becomes an embedding beside it."
                )),
            ],
            outputs=[io.String.Output("file", display_name="file", tooltip="The new file, as LoRA loaders list it.")],
        )

    @classmethod
    def execute(cls, model, clip, concept: ConceptValue, name: str, strength: float, overwrite: bool,
                bundle: bool = True) -> io.NodeOutput:
        require_clip(clip)
        require_no_difference(concept, "this node does not write as a LoRA")
        if concept.edit is None:
            raise ValueError("This concept is only a word, which no LoRA can hold alone; save it with Save Concept.")
        name = checked_name(name)
        check_fits(concept, sizes(model))
        tensors, beside = to_lora(model, concept, linear_dual(clip, concept), strength, bundle), ""
        if not bundle:
            kept = {key: text for key, text in concept.metadata.items() if key in KEPT}
            folder, called = embeddings_folder(), unused_name("embeddings", name, ENDINGS, overwrite)
            word = save(replace(concept, edit=None, metadata=kept), folder, called, overwrite, "diffusers")
            beside = f", and its word as {word.relative_to(folder).as_posix()} in models/embeddings"
        name = unused_name("loras", name, ENDINGS, overwrite)
        path = free_path(loras_folder(), name, ".safetensors", overwrite)
        write_whole(path, to_bytes(tensors, concept))
        saved = path.relative_to(loras_folder()).as_posix()
        return io.NodeOutput(saved, ui=shown(f"Saved {saved} in models/loras{beside}."))
