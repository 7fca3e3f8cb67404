"""The nodes: sockets, widgets, validation and one call into a method."""

from comfy_api.latest import ComfyExtension, io

from .apply_concept import ConceptsApply, ConceptsApplyStack, ConceptsHook
from .concept_files import ConceptsBundle, ConceptsLoad, ConceptsLoadLoraWords, ConceptsSave
from .encode_global_keys import ConceptsEncodeGlobalKeys
from .export_lora import ConceptsExportLora
from .import_e4t import ConceptsImportE4T
from .import_tuned import ConceptsImportTunedE4T
from .inline_concept import ConceptsInline
from .inspect_concept import ConceptsInspect
from .load_domain import ConceptsApplyDomain, ConceptsLoadDomain
from .load_photos import ConceptsLoadPhotos
from .microworld_photos import ConceptsMicroworldPhotos
from .pretrain_e4t import ConceptsPretrainE4T
from .train_perfusion import ConceptsTrainPerfusion
from .train_textual_inversion import ConceptsTrainTextualInversion
from .tune_e4t import ConceptsTuneE4T


class ConceptsExtension(ComfyExtension):
    """The pack as ComfyUI sees it."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            ConceptsLoadPhotos,
            ConceptsTrainTextualInversion,
            ConceptsTrainPerfusion,
            ConceptsTuneE4T,
            ConceptsPretrainE4T,
            ConceptsSave,
            ConceptsLoad,
            ConceptsLoadLoraWords,
            ConceptsLoadDomain,
            ConceptsImportE4T,
            ConceptsImportTunedE4T,
            ConceptsBundle,
            ConceptsApply,
            ConceptsApplyStack,
            ConceptsApplyDomain,
            ConceptsHook,
            ConceptsEncodeGlobalKeys,
            ConceptsInline,
            ConceptsExportLora,
            ConceptsInspect,
            ConceptsMicroworldPhotos,
        ]
