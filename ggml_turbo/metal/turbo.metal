// All our kernels, as one source: flatten.py puts the files in.

#if !defined(SIMT) // ggml_metal_library_init_from_source takes a warning for an error
#pragma clang diagnostic ignored "-Weverything"
#endif

#include <metal_stdlib>

#include "metal/turbo-block.metal"
#include "metal/turbo-rows.metal"
#include "metal/turbo-encode.metal"
#include "metal/turbo-attention.metal"
#include "metal/turbo-mul-mat.metal"
