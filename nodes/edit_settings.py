"""How strongly and when a concept acts: the widgets that its applying nodes share."""

from comfy_api.latest import io

from ..perfusion.apply import BIAS, TEMPERATURE


def edit_settings() -> list[io.Input]:
    """The slider from fidelity to prompt, and what an artist rarely touches. They do nothing for a plain word."""
    return [
        io.Float.Input("bias", default=BIAS, min=-1.0, max=2.0, step=0.01, optional=True, tooltip=(
            "From most like the photos (0.8 and below) to exactly what the prompt says (1.3), for a Perfusion concept; "
            "words and tuned models have no such slider. Moving it needs no training."
        )),
        io.Float.Input("temperature", default=TEMPERATURE, min=0.01, max=1.0, step=0.01, optional=True, advanced=True,
                       tooltip="How gradually the concept sets in around the bias. Low makes it on or off."),
        io.Float.Input("key_strength", default=1.0, min=0.0, max=2.0, step=0.05, optional=True, advanced=True,
                       tooltip=(
            "How firmly the word attracts attention like its class word. At 0 it attracts as the learned word does."
        )),
        io.Float.Input("start", default=0.0, min=0.0, max=1.0, step=0.01, optional=True, advanced=True, tooltip=(
            "From which share of the sampling on it acts. Later keeps the layout that the prompt would have alone."
        )),
        io.Float.Input("end", default=1.0, min=0.0, max=1.0, step=0.01, optional=True, advanced=True, tooltip=(
            "Up to which share of the sampling it acts."
        )),
        io.Boolean.Input("everywhere", default=False, optional=True, advanced=True, tooltip=(
            "The edit to the letter of the paper: also in prompts without the word, and a high bias takes the thing "
            "away. Off leaves prompts without the word exactly as they were, and a high bias leads to the class word."
        )),
    ]
