"""The host's progress bar, live picture, Cancel button and text under a node."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape

from comfy.model_management import InterruptProcessingException, throw_exception_if_processing_interrupted
from comfy.utils import ProgressBar
from comfy_api.latest import ui
from comfy_execution.utils import get_executing_context

__all__ = ["Cancelled", "ProgressBar", "shown", "stop_if_cancelled", "warned"]

Cancelled = InterruptProcessingException  # `except Exception` sees it in the oldest hosts only
stop_if_cancelled = throw_exception_if_processing_interrupted


@contextmanager
def warned() -> Iterator[list[str]]:
    """The sentences that this pack's log warns with while it lasts, each once, for whoever does not read the log."""
    sentences: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.addFilter(lambda record: record.getMessage() not in sentences)
    handler.emit = lambda record: sentences.append(record.getMessage())
    log = logging.getLogger("concepts")
    log.addHandler(handler)
    try:
        yield sentences
    finally:
        log.removeHandler(handler)


def shown(text: str) -> ui.PreviewText:
    """`text` as a node's output for whoever reads it there, also put under the node that is executing.

    The editor draws output texts of few nodes, none of them ours, and what is put under a node it takes as HTML.
    """
    if executing := get_executing_context():
        from server import PromptServer  # programs without a server do not load it

        server = PromptServer.instance
        server.send_progress_text(escape(text, quote=False), executing.node_id, server.client_id)
    return ui.PreviewText(text)
