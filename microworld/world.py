"""What other parts of the pack use of the sample world."""

from .concepts import CONCEPTS, concept_photos

__all__ = ["CONCEPTS", "concept_photos"]
