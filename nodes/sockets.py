"""The pack's own socket types."""

from comfy_api.latest import io

Concept = io.Custom("CONCEPT")
Domain = io.Custom("E4T_ENCODER")


def require_clip(clip) -> None:
    """Raises ValueError for a checkpoint that came without a text encoder."""
    if clip is None:
        raise ValueError("This checkpoint file has no text encoder (CLIP); load one and connect it to 'clip'.")
