"""Save Concept, Load Concept, and the words that travel in LoRA files."""

from pathlib import Path
from types import ModuleType

from comfy_api.latest import io
from safetensors import SafetensorError, safe_open

from ..e4t import difference_file
from ..e4t.difference import Difference
from ..host.folders import concepts_folder, embeddings_folder, file_names, file_path, loras_folder, unused_name
from ..host.progress import shown
from ..perfusion import file as edit_file
from ..perfusion.use import names
from ..textual_inversion import file
from ..textual_inversion.concept import Concept as ConceptValue
from ..training.names import ENDINGS, checked_name
from .sockets import Concept

EDITS = "concepts/"  # in front of the names of files in models/concepts, beside those in models/embeddings


class NamesFile(io.ComfyNode):
    """A node with the name of a file to write."""

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        """Why no file can have the name, told before anything is learned for it; a linked one (None) is not known."""
        try:
            return name is None or bool(checked_name(name))
        except ValueError as error:
            return str(error)


class ConceptsSave(NamesFile):
    """Writes a concept to the models folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptsSave",
            display_name="Save Concept",
            category="concepts/io",
            description=(
                "Saves a learned word to models/embeddings, where every ComfyUI can use it as embedding:name, with or "
                "without this pack, and any other concept to models/concepts, for Load Concept. Cover picture, "
                "trigger word and training settings travel in the file."
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
                io.Combo.Input("layout", options=list(file.LAYOUTS), default=file.DEFAULT_LAYOUT, optional=True,
                               advanced=True, tooltip=(
                    "Which programs a learned word is laid out for. The first is read by nearly all of them. A "
                    "Perfusion concept has one layout."
                )),
            ],
            outputs=[
                io.String.Output("text", display_name="prompt text", tooltip=(
                    "How to write it in a prompt: embedding:mine for a word, which needs no pack; the placeholder for "
                    "a Perfusion concept."
                )),
            ],
        )

    @classmethod
    def execute(cls, concept: ConceptValue, name: str, overwrite: bool,
                layout: str = file.DEFAULT_LAYOUT) -> io.NodeOutput:
        name = checked_name(name)
        if concept.edit is not None:
            if layout != file.DEFAULT_LAYOUT:
                raise ValueError(f"The layout {layout!r} is for learned words, and {concept.words[0].placeholder} is "
                                 f"more than a word; choose {file.DEFAULT_LAYOUT!r}.")
            folder, name = concepts_folder(), unused_name("concepts", name, ENDINGS, overwrite)
            writer = difference_file if isinstance(concept.edit, Difference) else edit_file
            path = writer.save(concept, folder, name, overwrite)
            text, listed = concept.words[0].placeholder, _listed(path.relative_to(folder).as_posix(), _words())
            return io.NodeOutput(text, ui=shown(
                f"Saved: choose {listed} in Load Concept, connect Apply Concept and write {text} in the prompt."
            ))
        if name.startswith(EDITS):
            raise ValueError(f"Load Concept lists files of models/concepts as {EDITS}name, so a word cannot be called "
                             f"{name!r}; choose another name.")
        folder, name = embeddings_folder(), unused_name("embeddings", name, ENDINGS, overwrite)
        path = file.save(concept, folder, name, overwrite, layout)
        text = f"embedding:{path.relative_to(folder).with_suffix('').as_posix()}"
        return io.NodeOutput(text, ui=shown(f"Saved: write {text} in any prompt."))


class ConceptsLoad(io.ComfyNode):
    """Reads a concept from the models folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptsLoad",
            display_name="Load Concept",
            category="concepts/io",
            description=(
                "Loads a learned word from models/embeddings, or a Perfusion concept or tuned model from "
                "models/concepts, for Apply Concept."
            ),
            search_aliases=["load embedding", "load textual inversion", "load perfusion"],
            inputs=[
                io.Combo.Input("name", options=_names(), tooltip=(
                    "A word in models/embeddings: safetensors, or .pt and .bin, which are read without running code; "
                    "or, with concepts/ in front, a Perfusion concept or tuned model in "
                    "models/concepts."
                )),
                io.String.Input("placeholder", default="", tooltip=(
                    "The word that prompts use for it. Empty takes the one in the file, or <file name>."
                )),
            ],
            outputs=[
                Concept.Output("concept", display_name="concept", tooltip="What was learned, for Apply Concept."),
                io.String.Output("placeholder", display_name="placeholder", tooltip="The word to write in prompts."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str | None, placeholder: str | None) -> str:
        """A file that was written anew is read anew, unless its name is linked: the host does not tell it then."""
        return _stamp(_path(name)) if name else ""

    @classmethod
    def execute(cls, name: str, placeholder: str) -> io.NodeOutput:
        return _loaded(_reader(name).load(_path(name), placeholder.strip()))


class ConceptsLoadLoraWords(io.ComfyNode):
    """Reads the words that a LoRA file brings along."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptsLoadLoraWords",
            display_name="Load Words of LoRA",
            category="concepts/io",
            description=(
                "Loads the learned words bundled in a LoRA file, which Load LoRA passes over. Give them to the CLIP "
                "with Apply Concept, and the LoRA itself to the model as always."
            ),
            search_aliases=["bundle_emb", "pivotal tuning", "lora embedding", "bundled embedding"],
            inputs=[
                io.Combo.Input("name", options=file_names("loras", (".safetensors",)), tooltip=(
                    "A file in models/loras that holds learned words."
                )),
            ],
            outputs=[
                Concept.Output("concept", display_name="concept", tooltip="The learned words, for Apply Concept."),
                io.String.Output("placeholder", display_name="placeholder", tooltip=(
                    "What to write in prompts, one after the other when there are several."
                )),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str | None) -> str:
        """A file that was written anew is read anew, unless its name is linked: the host does not tell it then."""
        return _stamp(file_path("loras", name)) if name else ""

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        return _loaded(file.load(file_path("loras", name)))


class ConceptsBundle(NamesFile):
    """Writes words into a copy of a LoRA file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptsBundle",
            display_name="Save Words in LoRA",
            category="concepts/io",
            description=(
                "Saves a copy of a LoRA file that carries a learned word along, so that both travel as one file. A1111 "
                "and Load Words of LoRA read such files; for Load LoRA it is a LoRA like any other."
            ),
            search_aliases=["bundle_emb", "bundle embedding", "pivotal tuning"],
            is_output_node=True,
            inputs=[
                Concept.Input("concept", tooltip="The word, from a training or from Load Concept."),
                io.Combo.Input("lora", options=file_names("loras", (".safetensors",)), tooltip=(
                    "The LoRA that the word belongs to. It stays as it is."
                )),
                io.String.Input("name", default="mine", tooltip="The new file's name in models/loras."),
                io.Boolean.Input("overwrite", default=False, tooltip=(
                    "Replace a file of that name. When off, a name that is taken gets a number: mine_2, then mine_3."
                )),
            ],
            outputs=[
                io.String.Output("file", display_name="file", tooltip="The new file, as LoRA loaders list it."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora: str | None, **inputs) -> str:
        """A LoRA that was written anew is read anew, unless its name is linked: the host does not tell it then."""
        return _stamp(file_path("loras", lora)) if lora else ""

    @classmethod
    def execute(cls, concept: ConceptValue, lora: str, name: str, overwrite: bool) -> io.NodeOutput:
        if concept.edit is not None:
            raise ValueError(f"{concept.words[0].placeholder} is more than the word that fits into a LoRA; use Export "
                             "Concept as LoRA for a Perfusion concept, or Save Concept.")
        name = unused_name("loras", checked_name(name), ENDINGS, overwrite)
        folder = loras_folder()
        path = file.bundle(concept, file_path("loras", lora), folder, name, overwrite)
        saved = path.relative_to(folder).as_posix()
        return io.NodeOutput(saved, ui=shown(f"Saved {saved} in models/loras."))


def _names() -> list[str]:
    words = _words()
    return [*words, *(_listed(name, words) for name in file_names("concepts", (edit_file.ENDING,)))]


def _words() -> list[str]:
    return file_names("embeddings", ENDINGS)


def _listed(name: str, words: list[str]) -> str:
    """What the list calls a file in models/concepts; a second slash where an embedding has that name."""
    return f"{EDITS}/{name}" if f"{EDITS}{name}" in words else f"{EDITS}{name}"


def _is_edit(name: str) -> bool:
    return name.startswith(EDITS) and name not in _words()


def _reader(name: str) -> ModuleType:
    """What reads a file of the list; one that cannot be opened is left to the reader of its folder, which says why."""
    if not _is_edit(name):
        return file
    try:
        with safe_open(_path(name), "pt") as opened:
            return difference_file if difference_file.is_difference(opened.metadata() or {}) else edit_file
    except (OSError, SafetensorError):
        return edit_file


def _path(name: str) -> Path:
    if _is_edit(name):
        return file_path("concepts", name.removeprefix(EDITS).removeprefix("/"))
    return file_path("embeddings", name)


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{status.st_mtime_ns} {status.st_size}"


def _loaded(concept: ConceptValue) -> io.NodeOutput:
    return io.NodeOutput(concept, names([concept]))
