"""What other parts of the pack use of the sample world."""

from .concepts import CONCEPTS, CURATED, concept_photos, super_category
from .domain import DOMAINS, instance_photos

__all__ = ["CONCEPTS", "CURATED", "DOMAINS", "concept_photos", "instance_photos", "super_category"]
