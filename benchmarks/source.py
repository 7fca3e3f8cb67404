"""What benchmarks keep between runs hangs on the code and the weights that made it."""

import hashlib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "e4t", "host", "microworld", "nodes", "perfusion", "textual_inversion", "training")


@cache
def code() -> str:
    """A digest of the methods' source, of what they are measured with, and of the sample model and its judges."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in FOLDERS for kind in ("*.py", "*.safetensors")
                       for path in (ROOT / folder).rglob(kind)):
        digest.update(path.read_bytes())
    return digest.hexdigest()
