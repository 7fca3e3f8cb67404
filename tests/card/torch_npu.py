"""The tests' graphics card (`card.cpp`) under the name of a device that ComfyUI knows, Ascend's `npu`.

ComfyUI imports `torch_npu` where it is installed, and then works on `torch.device("npu")`, as on any other card.
"""

import hashlib
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from torch.utils import cpp_extension

SOURCE = Path(__file__).with_name("card.cpp")
TOTAL = int(os.environ.get("CONCEPTS_CARD_BYTES", 8 * 2**30))


def built() -> Path:
    """The library, compiled for this torch where that has not been done before."""
    digest = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = Path(os.environ.get("CONCEPTS_CARD_FOLDER", tempfile.gettempdir())) / f"concepts-card-{digest}.so"
    if not library.exists():
        part = library.with_suffix(f".{os.getpid()}")
        headers = [f"-I{folder}" for folder in (*cpp_extension.include_paths(), sysconfig.get_path("include"))]
        torch_itself = [*(f"-L{folder}" for folder in cpp_extension.library_paths()), "-ltorch_cpu", "-lc10"]
        abi = int(torch.compiled_with_cxx11_abi())
        subprocess.run(["g++", "-O1", "-std=c++17", "-shared", "-fPIC", f"-D_GLIBCXX_USE_CXX11_ABI={abi}", *headers,
                        str(SOURCE), *torch_itself, "-o", str(part)], check=True)
        part.replace(library)
    return library


def module() -> ModuleType:
    """`torch.npu`, as far as ComfyUI and torch ask it."""
    npu = ModuleType("torch.npu")
    npu.is_available = lambda: True
    npu.is_initialized = lambda: True
    npu.device_count = lambda: 1
    npu.current_device = lambda: 0
    npu.set_device = npu.manual_seed_all = npu.synchronize = npu.empty_cache = lambda *_: None
    npu.get_device_name = lambda *_: "card of the tests"
    npu._is_in_bad_fork = lambda: False
    npu.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    npu.memory_stats = lambda *_: {"reserved_bytes.all.current": 0, "active_bytes.all.current": 0}
    npu.mem_get_info = lambda *_: (TOTAL, TOTAL)
    return npu


torch.ops.load_library(str(built()))
torch.utils.rename_privateuse1_backend("npu")
torch._register_device_module("npu", module())
torch.utils.generate_methods_for_privateuse1_backend()
sys.modules["torch.npu"] = torch.npu
torch.version.cuda = None  # as in the torch that Ascend's package goes with
