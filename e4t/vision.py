"""The CLIP vision that a domain's encoder sees pictures with."""

from ..host.clip_vision import Vision
from ..host.sockets import ClipVisionModel
from .domain import Domain


def vision_for(domain: Domain, clip_vision: ClipVisionModel | None) -> Vision | None:
    """What the encoder needs to see: the CLIP vision that it was pretrained with, or nothing where it has a stem.

    Raises ValueError when it is needed and is missing or another one.
    """
    if not domain.vision:
        return None
    if clip_vision is None:
        raise ValueError(f"The domain {domain.word!r} sees pictures through CLIP vision ({domain.vision}); load the "
                         "one that it was pretrained with and connect it to 'clip_vision'.")
    vision = Vision(clip_vision)
    if vision.fingerprint != domain.vision:
        raise ValueError(f"The domain {domain.word!r} was pretrained with another CLIP vision ({domain.vision}) than "
                         f"the one at 'clip_vision' ({vision.fingerprint}); connect the one it was pretrained with.")
    return vision
