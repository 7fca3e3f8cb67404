"""The host's own loading of models."""

import comfy.model_management
from comfy.model_patcher import ModelPatcher


def load(model: ModelPatcher) -> None:
    """Lets the host load the weights with the LoRAs on them, as much of them as the card has room for.

    Layers that stay outside are cast when they are called.
    """
    comfy.model_management.load_models_gpu([model])
