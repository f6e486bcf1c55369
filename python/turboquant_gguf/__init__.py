"""Low-bit KV caches for llama.cpp: the GGML types turbo2, turbo3 and turbo4, and the tools around them.

Importing this package makes llama-cpp-python, if it is imported later, use the llama.cpp of this package.
"""

from .codec import TurboType, dequantize, quantize, simd, types
from .llamacpp import bindings
from .weights import converter

bindings.point_at_us()

__all__ = ["TurboType", "converter", "dequantize", "quantize", "simd", "types"]
