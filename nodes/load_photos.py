"""Load Concept Photos."""

import torch
from comfy_api.latest import io

from ..host.folders import input_subfolder, input_subfolders
from ..host.progress import shown
from ..training.folder import fingerprint, read_folder


class ConceptsLoadPhotos(io.ComfyNode):
    """Photos, masks and captions out of a folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptsLoadPhotos",
            display_name="Load Concept Photos",
            category="concepts/train",
            description=(
                "Loads the photos of a folder with their masks and captions, for training. Change one of "
                "them and the next queue trains anew; change none and it does not."
            ),
            search_aliases=["dataset", "load folder", "training images", "captions", "kohya"],
            inputs=[
                io.Combo.Input("folder", options=input_subfolders(), tooltip=(
                    "A folder in ComfyUI's input folder. A caption is the .txt of a photo's name; a mask is "
                    "name.mask.png, white on the thing, or the photo's own alpha channel."
                )),
            ],
            outputs=[
                io.Image.Output("images", display_name="images", is_output_list=True, tooltip=(
                    "The photos, the largest of them made smaller: to 2048 pixels on the short side."
                )),
                io.Mask.Output("masks", display_name="masks", is_output_list=True, tooltip=(
                    "Where the thing is in each photo; everywhere for photos without a mask, in which trainings look "
                    "for it themselves."
                )),
                io.String.Output("captions", display_name="captions", is_output_list=True, tooltip=(
                    "What each photo shows; empty for photos without a caption."
                )),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str | None) -> str:
        """Changed files are read anew, unless the folder's name is linked: the host does not tell it then."""
        return fingerprint(input_subfolder(folder)) if folder else ""

    @classmethod
    def execute(cls, folder: str) -> io.NodeOutput:
        photos = read_folder(input_subfolder(folder))
        images = [photo.picture[None] for photo in photos]
        masks = [torch.ones(1, 1, 1).expand(image.shape[:3]) if photo.mask is None else photo.mask[None]
                 for photo, image in zip(photos, images, strict=True)]
        masked, captioned = sum(p.mask is not None for p in photos), sum(bool(p.caption) for p in photos)
        said = f"{len(photos)} photos, {masked} with a mask, {captioned} with a caption"
        return io.NodeOutput(images, masks, [photo.caption for photo in photos], ui=shown(said))
