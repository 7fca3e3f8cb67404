"""Where the host keeps embeddings and results."""

from pathlib import Path

import folder_paths


def embedding_names() -> list[str]:
    """The safetensors files in the embeddings folders, as the host lists them."""
    return [name for name in folder_paths.get_filename_list("embeddings") if name.endswith(".safetensors")]


def embedding_path(name: str) -> Path:
    """The file behind a listed name. Raises ValueError when it is gone."""
    path = folder_paths.get_full_path("embeddings", name)
    if path is None:
        raise ValueError(f"There is no embedding {name!r} in models/embeddings; press R to refresh the list.")
    return Path(path)


def embeddings_folder() -> Path:
    """The first embeddings folder, where new words are saved."""
    return Path(folder_paths.get_folder_paths("embeddings")[0])


def unfinished_folder() -> Path:
    """Where words of stopped trainings are kept: output/concepts."""
    return Path(folder_paths.get_output_directory()) / "concepts"
