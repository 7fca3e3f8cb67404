"""ComfyUI-Concepts: teach a checkpoint your own subjects and compose them on the graph."""

from .host import folders
from .host.version import check_version
from .microworld import host

WEB_DIRECTORY = "./web"

folders.register()
host.register()


async def comfy_entrypoint():
    """What ComfyUI calls to learn of the nodes."""
    check_version()
    from .nodes import ConceptsExtension

    return ConceptsExtension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
