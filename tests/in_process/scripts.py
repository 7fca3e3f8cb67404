"""For scripts that tests start as processes of their own."""

import importlib.util
import sys


def script(path):
    """Import a file as a module of its stem."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
