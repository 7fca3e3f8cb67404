"""Import E4T."""

from comfy_api.latest import io

from ..e4t import domain
from ..e4t.import_release import domain_of, report
from ..e4t.imported import ImportedEncoder
from ..e4t.release import Release, read_release
from ..host.clip_vision import Vision, from_open_clip
from ..host.folders import DOMAINS, domains_folder, folder_path, folders_with, free_name
from ..host.progress import shown
from .sockets import Domain


class ConceptsImportE4T(io.ComfyNode):
    """Makes a domain of a published release."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptsImportE4T",
            display_name="Import E4T",
            category="concepts/io",
            description=(
                "Makes a domain of a release of e4t-diffusion, such as e4t-diffusion-ffhq-celebahq-v1 for faces: its "
                "weight offsets become a few hundred times smaller with hardly any loss, and all is saved as one file "
                "in models/e4t. Needed once; Load E4T Domain reads that file."
            ),
            search_aliases=["e4t", "import domain", "mkshing", "e4t-diffusion", "weight_offsets.pt"],
            is_output_node=True,
            inputs=[
                io.Combo.Input("folder", options=folders_with(DOMAINS, "config.json"), tooltip=(
                    "A folder in models/e4t with the release's config.json, encoder.pt and weight_offsets.pt. They are "
                    "read without running code."
                )),
                io.String.Input("name", default="", tooltip=(
                    "What the file in models/e4t is called; empty takes the domain's class word. The same name "
                    "replaces an earlier import; that of a domain of the pack gets a number, as teddy_2."
                )),
                io.ClipVision.Input("clip_vision", optional=True, tooltip=(
                    "The CLIP vision that the release was trained with, ViT-H/14 of LAION for the published one. Only "
                    "needed where encoder.pt brings none along."
                )),
            ],
            outputs=[
                Domain.Output("domain", display_name="domain", tooltip="For Tune E4T and Apply E4T Domain."),
                io.ClipVision.Output("clip_vision", display_name="clip_vision", tooltip=(
                    "The CLIP vision that Tune E4T needs with this domain: the release's own, or the one given."
                )),
                io.String.Output("report", display_name="report", tooltip=(
                    "What was read, the sizes before and after, and the error of the smaller offsets."
                )),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str | None, **inputs) -> str:
        """A folder that was downloaded anew is read anew, unless its name is linked: the host does not tell it then."""
        files = sorted(folder_path(DOMAINS, folder).iterdir()) if folder else ()
        return " ".join(f"{path.name} {path.stat().st_mtime_ns}" for path in files)

    @classmethod
    def execute(cls, folder: str, name: str, clip_vision=None) -> io.NodeOutput:
        release = read_release(folder_path(DOMAINS, folder))
        file = free_name(DOMAINS, domain.file_name(name, release.domain_word), domain.ENDING)
        there = domains_folder() / f"{file}{domain.ENDING}"
        if there.exists() and not isinstance(domain.load(there).encoder, ImportedEncoder):
            raise ValueError(f"{there.name} in models/e4t is a domain that was pretrained, which an import would "
                             "replace; write another name.")
        eye = eye_of(release, folder, clip_vision)
        made = domain_of(release, Vision(eye))
        path = domain.save(made, domains_folder(), file, overwrite=True)
        listed, size = path.relative_to(domains_folder()).as_posix(), path.stat().st_size
        said = f"{report(release, made.vision)}\nSaved {size / 1e6:.0f} MB: choose {listed} in Load E4T Domain."
        return io.NodeOutput(domain.load(path), eye, said, ui=shown(said))


def eye_of(release: Release, folder: str, clip_vision):
    """The CLIP vision that the encoder of a release sees with, its own or the one given; ValueError for none."""
    eye = from_open_clip(release.clip_vision) if release.clip_vision else clip_vision
    if eye is None:
        raise ValueError(f"The encoder.pt of {folder} brings no CLIP vision along; connect the one that it was trained "
                         "with to 'clip_vision', ViT-H/14 of LAION for the published release.")
    return eye
