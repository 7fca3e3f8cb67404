"""Save Concept and Load Concept."""

from comfy_api.latest import io, ui

from ..host.folders import embedding_names, embedding_path, embeddings_folder
from ..textual_inversion import file
from ..textual_inversion.concept import Concept as ConceptValue
from .sockets import Concept


class ConceptsSave(io.ComfyNode):
    """Writes a concept to the models folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptsSave",
            display_name="Save Concept",
            category="concepts/io",
            description=(
                "Saves a learned word to models/embeddings, where every ComfyUI can use it as embedding:name, with or "
                "without this pack. Cover picture, trigger word and training settings travel in the file."
            ),
            search_aliases=["save embedding", "save textual inversion", "export embedding"],
            is_output_node=True,
            inputs=[
                Concept.Input("concept", tooltip="What to save, from a training or from Load Concept."),
                io.String.Input("name", default="mine", tooltip=(
                    "The file's name, and the word behind embedding: in prompts. people/anna saves to a subfolder."
                )),
                io.Boolean.Input("overwrite", default=False, tooltip=(
                    "Replace a file of that name. When off, a name that is taken gets a number: mine_2, then mine_3."
                )),
            ],
            outputs=[
                io.String.Output("text", display_name="prompt text", tooltip=(
                    "How to write it in a prompt where this pack is not installed, such as embedding:mine."
                )),
            ],
        )

    @classmethod
    def execute(cls, concept: ConceptValue, name: str, overwrite: bool) -> io.NodeOutput:
        folder = embeddings_folder()
        path = file.save(concept, folder, name, overwrite)
        text = f"embedding:{path.relative_to(folder).with_suffix('').as_posix()}"
        return io.NodeOutput(text, ui=ui.PreviewText(f"Saved: write {text} in any prompt."))


class ConceptsLoad(io.ComfyNode):
    """Reads a concept from the models folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptsLoad",
            display_name="Load Concept",
            category="concepts/io",
            description="Loads a learned word from models/embeddings, to be given to a CLIP by Apply Concept.",
            search_aliases=["load embedding", "load textual inversion"],
            inputs=[
                io.Combo.Input("name", options=embedding_names(), tooltip="A safetensors file in models/embeddings."),
                io.String.Input("placeholder", default="", tooltip=(
                    "The word that prompts use for it. Empty takes the one in the file, or <file name>."
                )),
            ],
            outputs=[
                Concept.Output("concept", display_name="concept", tooltip="The learned word, for Apply Concept."),
                io.String.Output("placeholder", display_name="placeholder", tooltip="The word to write in prompts."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str, placeholder: str) -> str:
        """A file that was written anew is read anew."""
        status = embedding_path(name).stat()
        return f"{status.st_mtime_ns} {status.st_size}"

    @classmethod
    def execute(cls, name: str, placeholder: str) -> io.NodeOutput:
        concept = file.load(embedding_path(name), placeholder.strip())
        return io.NodeOutput(concept, concept.words[0].placeholder)
