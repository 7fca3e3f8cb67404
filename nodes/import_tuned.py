"""Import Tuned E4T."""

from comfy_api.latest import io

from ..e4t import difference_file
from ..e4t.import_release import BASE
from ..e4t.import_tuned import concept_of
from ..e4t.release import read_release
from ..host.bases import base_name, native_side
from ..host.clip_vision import Vision
from ..host.folders import DOMAINS, folder_path, folders_with
from ..host.pictures import to_latents
from ..host.progress import shown
from ..training.dataset import gather, squares
from ..training.folder import read_photo
from .import_e4t import ConceptsImportE4T, eye_of
from .sockets import Concept
from .training_inputs import check_sockets

PICTURE = "domain.png"  # the picture that the folder was tuned on, as e4t-diffusion saves it


class ConceptsImportTunedE4T(io.ComfyNode):
    """Makes a concept of a model that e4t-diffusion tuned on one picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptsImportTunedE4T",
            display_name="Import Tuned E4T",
            category="concepts/io",
            description=(
                "Makes a concept of a folder that e4t-diffusion tuned on one picture: of its whole UNet of 4 GB, the "
                "weight offsets and the attention matrices' change stay, as some MB. Save Concept keeps it."
            ),
            search_aliases=["e4t", "import concept", "mkshing", "e4t-diffusion", "unet.pt"],
            inputs=[
                io.Model.Input("model", tooltip="The checkpoint that it was tuned from, Stable Diffusion 1.4 or 1.5."),
                io.Clip.Input("clip", tooltip="The checkpoint's text encoder."),
                io.Vae.Input("vae", tooltip="The checkpoint's VAE."),
                io.Combo.Input("folder", options=folders_with(DOMAINS, "config.json"), tooltip=(
                    "A folder in models/e4t with config.json, encoder.pt and unet.pt. They are read without running "
                    "code."
                )),
                io.String.Input("placeholder", default="<mine>", tooltip="The word that prompts will use for it."),
                io.Int.Input("rank", default=16, min=1, max=64, advanced=True, tooltip=(
                    "How many directions of each matrix's change are kept: more keep more of it in a larger file, 0.4 "
                    "MB each. The report says how much that is."
                )),
                io.Image.Input("image", optional=True, tooltip=(
                    "The picture it was tuned on; without one, domain.png of the folder."
                )),
                io.ClipVision.Input("clip_vision", optional=True, tooltip=(
                    "The CLIP vision of the release, ViT-H/14 of LAION for the published one. Only needed where "
                    "encoder.pt brings none along."
                )),
            ],
            outputs=[
                Concept.Output("concept", display_name="concept", tooltip="For Save Concept and Apply Concept."),
                io.String.Output("report", display_name="report", tooltip="How much of the tuning the concept holds."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str | None, **inputs) -> str:
        """As for a domain."""
        return ConceptsImportE4T.fingerprint_inputs(folder)

    @classmethod
    def execute(cls, model, clip, vae, folder: str, placeholder: str, rank: int, image=None,
                clip_vision=None) -> io.NodeOutput:
        word = placeholder.strip()
        check_sockets({"model": model, "clip": clip, "vae": vae, "placeholder": word})
        if base_name(model) != BASE:
            raise ValueError(f"Releases of e4t-diffusion are for {BASE}, and this checkpoint is {base_name(model)}; "
                             "load the one that the folder was tuned from.")
        path = folder_path(DOMAINS, folder)
        release = read_release(path)
        if not release.unet:
            raise ValueError(f"{folder} holds a domain, not a model tuned on one picture: it has no unet.pt. Use "
                             "Import E4T.")
        eye = eye_of(release, folder, clip_vision)
        if image is None and not (path / PICTURE).is_file():
            raise ValueError(f"{folder} has no {PICTURE}, the picture it was tuned on; connect that picture to "
                             "'image'.")
        photos = [read_photo(path / PICTURE)] if image is None else gather([image])[:1]
        (square,) = squares(photos, native_side(model))
        latent = to_latents(model, vae, square.picture[None])
        concept, kept = concept_of(release, model, clip, square.picture[None], latent, Vision(eye), word, rank)
        size = len(difference_file.to_bytes(concept))
        said = (f"{word}: a {release.domain_word} tuned on {release.base}, {size / 1e6:.1f} MB with its weight "
                f"offsets. Of what tuning changed besides these, {100 * kept.attention:.0f} % is in attention matrices,"
                f" of which rank {rank} keeps {100 * kept.factors:.0f} %; the rest is left out.")
        if release.text_encoder:
            said += " Its tuned text encoder is left out too."
        return io.NodeOutput(concept, said, ui=shown(said))
