"""The host's progress bar, live picture and Cancel button."""

from comfy.model_management import InterruptProcessingException, throw_exception_if_processing_interrupted
from comfy.utils import ProgressBar

__all__ = ["Cancelled", "ProgressBar", "stop_if_cancelled"]

Cancelled = InterruptProcessingException  # a BaseException: `except Exception` does not see it
stop_if_cancelled = throw_exception_if_processing_interrupted
