#pragma once

// Stands in for llama.cpp's file of this name where kernels of ours run in the emulator: what they use of it.

#include "cuda.h"

#define WARP_SIZE 32

static inline void ggml_cuda_pdl_sync() {}

using cudaStream_t = void *;

struct ggml_backend_cuda_context {
    int device = 0;
    cudaStream_t stream() { return nullptr; }
};
