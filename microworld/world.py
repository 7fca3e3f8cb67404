"""What other parts of the pack use of the sample world."""

from .concepts import CONCEPTS, CURATED, concept_photos, super_category

__all__ = ["CONCEPTS", "CURATED", "concept_photos", "super_category"]
