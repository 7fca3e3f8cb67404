"""Sample World Photos."""

import torch
from comfy_api.latest import io

from ..microworld.world import CONCEPTS, CURATED, concept_photos, super_category


class ConceptsMicroworldPhotos(io.ComfyNode):
    """Photos of something no word describes, from the pack's sample world."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptsMicroworldPhotos",
            display_name="Sample World Photos",
            category="concepts/sample world",
            description=(
                "Photos of one thing from the small drawn world that comes with this pack, to try training on "
                "microworld.safetensors. Each thing has a look that no prompt can put into words."
            ),
            search_aliases=["microworld", "sample photos", "example dataset", "test images"],
            inputs=[
                io.Combo.Input("concept", options=[*CONCEPTS, *CURATED], default=next(iter(CONCEPTS)), tooltip=(
                    "Which thing to photograph. Choose settings on the validation ones, judge them on the test ones. "
                    "The last is a curated set: mugs of every colour, each as often."
                )),
                io.Int.Input("count", default=4, min=1, max=64, tooltip=(
                    "How many photos, each in another pose and place."
                )),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFF,
                             control_after_generate=io.ControlAfterGenerate.fixed, tooltip=(
                    "Other seeds give other poses and places of the same thing."
                )),
            ],
            outputs=[
                io.Image.Output("images", display_name="images", tooltip="The photos, 128 pixels a side."),
                io.Mask.Output("masks", display_name="masks", tooltip="Where the thing is in each photo."),
                io.String.Output("class_word", display_name="class word", tooltip=(
                    "The ordinary word for it, such as 'cat': the init text of a training."
                )),
            ],
        )

    @classmethod
    def execute(cls, concept: str, count: int, seed: int) -> io.NodeOutput:
        pictures, masks = concept_photos(concept, count, seed)
        return io.NodeOutput(torch.from_numpy(pictures), torch.from_numpy(masks), super_category(concept))
