"""Loads the back end that test_vulkan.py has built, in a process of its own: in one that has a device, everything else would use it."""

import ctypes
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from turboquant_gguf.llamacpp import ggml  # noqa: E402

_load = ctypes.CDLL(str(ggml.library_path("ggml"))).ggml_backend_load
_load.restype, _load.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
assert _load(os.environ["GGML_BACKEND_PATH"].encode()), "the Vulkan back end was not loaded"
