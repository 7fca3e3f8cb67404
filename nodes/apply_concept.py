"""Apply Concept, to a model or to single prompts, one at a time or many."""

from comfy_api.latest import io

from ..perfusion.use import concept_hook, names
from ..textual_inversion.concept import Concept as ConceptValue
from .applying import applied, require_no_difference
from .edit_settings import edit_settings
from .sockets import Concept, require_clip


class ConceptsApply(io.ComfyNode):
    """Gives a model and its CLIP a concept."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptsApply",
            display_name="Apply Concept",
            category="concepts/apply",
            description=(
                "Makes a concept available to the prompts behind it: write its placeholder, such as <mine>, in CLIP "
                "Text Encode. Chain several like LoRA loaders. The model and CLIP that come in stay as they are."
            ),
            search_aliases=["use embedding", "apply textual inversion", "apply perfusion", "learned word",
                            "concept loader"],
            inputs=[
                io.Model.Input("model", tooltip="The checkpoint. A learned word leaves it as it is."),
                io.Clip.Input("clip", tooltip="The text encoder that is to understand the word."),
                Concept.Input("concept", tooltip="What was learned, from a training or from Load Concept."),
                io.Float.Input("strength", default=1.0, min=-2.0, max=3.0, step=0.05, tooltip=(
                    "1 is the concept as learned. Towards 0 it nears the plain class word (a Perfusion concept only "
                    "in part, for which the bias is the slider), above 1 it goes further. At exactly 0 the node does "
                    "nothing and the placeholder is just text."
                )),
                *edit_settings(),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="The checkpoint with the concept."),
                io.Clip.Output("clip", display_name="clip", tooltip=(
                    "The text encoder with the word, for CLIP Text Encode."
                )),
            ],
        )

    @classmethod
    def execute(cls, model, clip, concept: ConceptValue, strength: float, **settings) -> io.NodeOutput:
        require_clip(clip)
        return io.NodeOutput(*applied(model, clip, concept, strength, **settings))


class ConceptsApplyStack(io.ComfyNode):
    """Gives a model and its CLIP any number of concepts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        each = io.Autogrow.TemplatePrefix(Concept.Input("concept", tooltip="A concept to apply."), prefix="concept",
                                           min=1, max=16)
        return io.Schema(
            node_id="ConceptsApplyStack",
            display_name="Apply Concepts",
            category="concepts/apply",
            description=(
                "Makes up to sixteen concepts available at once, with one strength and bias for all. For settings of "
                "their own chain Apply Concept; the result is the same."
            ),
            search_aliases=["concept stack", "multi concept", "several concepts"],
            inputs=[
                io.Model.Input("model", tooltip="The checkpoint."),
                io.Clip.Input("clip", tooltip="The text encoder that is to understand the words."),
                io.Autogrow.Input("concepts", template=each, tooltip="Connect one and a place for the next appears."),
                io.Float.Input("strength", default=1.0, min=-2.0, max=3.0, step=0.05, tooltip=(
                    "The strength of every concept, as in Apply Concept."
                )),
                *edit_settings(),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="The checkpoint with the concepts."),
                io.Clip.Output("clip", display_name="clip", tooltip="The text encoder with the words."),
                io.String.Output("placeholders", display_name="placeholders", tooltip="The words to write in prompts."),
            ],
        )

    @classmethod
    def execute(cls, model, clip, concepts: dict, strength: float, **settings) -> io.NodeOutput:
        require_clip(clip)
        chosen = [concept for concept in concepts.values() if concept is not None]
        for concept in chosen:
            model, clip = applied(model, clip, concept, strength, **settings)
        return io.NodeOutput(model, clip, names(chosen))


class ConceptsHook(io.ComfyNode):
    """A concept for single prompts, regions and schedules."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptsHook",
            display_name="Concept as Hook",
            category="concepts/apply",
            description=(
                "Gives a concept to single prompts instead of the whole model: attach the hooks to a conditioning with "
                "Cond Set Props or Set CLIP Hooks, together with a mask for a region. Encode that prompt with this "
                "node's clip."
            ),
            search_aliases=["regional concept", "concept mask", "hook", "schedule concept"],
            inputs=[
                io.Model.Input("model", tooltip="The checkpoint that will sample. It is only looked at."),
                io.Clip.Input("clip", tooltip="The text encoder that is to understand the word."),
                Concept.Input("concept", tooltip="What was learned, from a training or from Load Concept."),
                io.Float.Input("strength", default=1.0, min=-2.0, max=3.0, step=0.05, tooltip=(
                    "1 is the concept as learned. Towards 0 it nears the plain class word in part; the bias goes all "
                    "the way."
                )),
                *edit_settings(),
            ],
            outputs=[
                io.Hooks.Output("hooks", display_name="hooks", tooltip="For Cond Set Props and its kin."),
                io.Clip.Output("clip", display_name="clip", tooltip="The text encoder with the word."),
            ],
        )

    @classmethod
    def execute(cls, model, clip, concept: ConceptValue, strength: float, **settings) -> io.NodeOutput:
        require_clip(clip)
        require_no_difference(concept, "hooks cannot carry")
        return io.NodeOutput(*concept_hook(model, clip, concept, strength, **settings))
