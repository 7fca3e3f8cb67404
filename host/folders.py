"""Where the host keeps embeddings and results."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import folder_paths

log = logging.getLogger("concepts")
CONCEPTS, DOMAINS = "concepts", "e4t"


def file_names(kind: str, endings: tuple[str, ...]) -> list[str]:
    """The files with those endings in the folders of a kind (`embeddings`, `loras`).

    Subfolders are written with / on every system, so that a workflow opens on all.
    """
    names = (name.replace(os.sep, "/") for name in folder_paths.get_filename_list(kind))
    return [name for name in names if name.lower().endswith(endings)]


def file_path(kind: str, name: str) -> Path:
    """The file behind a listed name. Raises ValueError when it is gone."""
    path = folder_paths.get_full_path(kind, name)
    if path is None:
        raise ValueError(f"There is no {name!r} in models/{kind}; press R to refresh the list.")
    return Path(path)


def folders_with(kind: str, file: str) -> list[str]:
    """The folders somewhere below those of a kind that hold a file of this name."""
    roots = (Path(root) for root in folder_paths.get_folder_paths(kind))
    return sorted({path.parent.relative_to(root).as_posix() for root in roots for path in root.glob(f"*/**/{file}")})


def folder_path(kind: str, name: str) -> Path:
    """The folder behind a listed name, which may be a link. Raises ValueError when it is gone or lies elsewhere."""
    for root in folder_paths.get_folder_paths(kind):
        path = _below(root, name)
        if path and path != _below(root, "") and path.is_dir():
            return path
    raise ValueError(f"There is no folder {name!r} in models/{kind}; press R to refresh the list.")


def _below(root: str, name: str) -> Path | None:
    """The place of a name in a folder, links in it not followed; None where it leads out of the folder."""
    path = Path(os.path.abspath(os.path.join(root, name)))
    return path if path.is_relative_to(os.path.abspath(root)) else None


def register() -> None:
    """Makes models/concepts and models/e4t folders of models, after those the user configured.

    Calling it twice changes nothing.
    """
    for kind in (CONCEPTS, DOMAINS):
        folder_paths.add_model_folder_path(kind, str(Path(folder_paths.models_dir) / kind))
        folder_paths.folder_names_and_paths[kind][1].add(".safetensors")


def free_name(kind: str, name: str, ending: str) -> str:
    """A name for a file in the first folder of a kind: with a counter where it would hide that of another folder."""
    others = folder_paths.get_folder_paths(kind)[1:]
    return _numbered(name, lambda free: any((Path(folder) / f"{free}{ending}").exists() for folder in others))


def unused_name(kind: str, name: str, endings: tuple[str, ...], overwrite: bool) -> str:
    """A name for a file in the first folder of a kind: with a counter where files of any folder answer to it.

    With `overwrite` it stays as it is, and the log says which other files answer to it.
    """
    places = _places(kind)
    free = name if overwrite else _numbered(name, lambda other: bool(_answering(kind, places, other, endings)))
    own = os.path.join(folder_paths.get_folder_paths(kind)[0], free)
    for other in sorted(_answering(kind, places, free, endings) - {os.path.realpath(own + end) for end in endings}):
        log.warning("%s and %s answer to the same name, of which ComfyUI loads only one; rename one of them.",
                    own, other)
    return free


def _numbered(name: str, taken: Callable[[str], bool]) -> str:
    """The name, with the first counter from 2 on with which it is not taken."""
    free, number = name, 2
    while taken(free):
        free, number = f"{name}_{number}", number + 1
    return free


def _places(kind: str) -> list[str]:
    """Where the host looks for a name: in the folders of a kind, and for embedding:name in all below them too."""
    roots = folder_paths.get_folder_paths(kind)
    if kind != "embeddings":
        return roots
    return [place for root in roots for place, *_ in os.walk(root, followlinks=True)]


def _answering(kind: str, places: list[str], name: str, endings: tuple[str, ...]) -> set[str]:
    """The files that the host may load for a name: of embeddings, those in any subfolder, as it tells no order."""
    called = os.path.basename(name) if kind == "embeddings" else name
    paths = (os.path.join(place, called + ending) for place in places for ending in endings)
    return {os.path.realpath(path) for path in paths if os.path.exists(path)}


def domains_folder() -> Path:
    """The first folder of E4T domains, where new ones are saved."""
    return Path(folder_paths.get_folder_paths(DOMAINS)[0])


def concepts_folder() -> Path:
    """The first concepts folder, where concepts with an edit are saved."""
    return Path(folder_paths.get_folder_paths(CONCEPTS)[0])


def loras_folder() -> Path:
    """The first LoRA folder, where LoRAs with words are saved."""
    return Path(folder_paths.get_folder_paths("loras")[0])


def embeddings_folder() -> Path:
    """The first embeddings folder, where new words are saved."""
    return Path(folder_paths.get_folder_paths("embeddings")[0])


def unfinished_folder() -> Path:
    """Where words of stopped trainings are kept: output/concepts."""
    return Path(folder_paths.get_output_directory()) / "concepts"


def states_folder() -> Path:
    """Where running trainings keep the states they can go on from: output/concepts/states."""
    return unfinished_folder() / "states"


def covariances_folder() -> Path:
    """Where the covariances of text encoders are kept: user/concepts/covariances."""
    return Path(folder_paths.get_user_directory()) / "concepts" / "covariances"


def input_subfolders() -> list[str]:
    """The folders in the input folder, as the host lists them, and links; empty ones (its own input/3d) last."""
    root = Path(folder_paths.get_input_directory())
    names = {*folder_paths.get_input_subfolders(), *(path.name for path in root.glob("*") if path.is_dir())}
    return sorted(names, key=lambda name: (_is_empty(root / name), name))


def _is_empty(folder: Path) -> bool:
    """Whether nothing is seen in a folder, as in one that this user may not read (lost+found)."""
    try:
        return not any(folder.iterdir())
    except OSError:
        return True


def input_subfolder(name: str) -> Path:
    """A listed folder, which may be a link. Raises ValueError when it is gone or lies elsewhere."""
    path = _below(folder_paths.get_input_directory(), name)
    if path is None or not path.is_dir():
        raise ValueError(f"There is no folder {name!r} in ComfyUI's input folder; press R to refresh the list.")
    return path
