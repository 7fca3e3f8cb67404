"""Encode Prompt with Global Key Lock."""

from comfy_api.latest import io

from ..perfusion.global_keys import encode_with_global_keys
from .sockets import require_clip


class ConceptsEncodeGlobalKeys(io.ComfyNode):
    """A prompt that lays out the picture as its class words would."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptsEncodeGlobalKeys",
            display_name="Encode Prompt with Global Key Lock",
            category="concepts/apply",
            description=(
                "Like CLIP Text Encode, but where in the picture each word acts is decided as if the class word stood "
                "in the concept's place. The prompt gains (scenes, poses, attributes), likeness loses, with two "
                "concepts in one prompt much of it."
            ),
            search_aliases=["global key locking", "perfusion", "clip text encode", "prompt adherence"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder that knows the concept's word, from Apply Concept."),
                io.String.Input("text", multiline=True, dynamic_prompts=True, tooltip=(
                    "The prompt, with the placeholder. Without one it is encoded as CLIP Text Encode does."
                )),
            ],
            outputs=[io.Conditioning.Output("conditioning", display_name="conditioning", tooltip=(
                "For the sampler, like that of CLIP Text Encode."
            ))],
        )

    @classmethod
    def execute(cls, clip, text: str) -> io.NodeOutput:
        require_clip(clip)
        return io.NodeOutput(encode_with_global_keys(clip, text))
