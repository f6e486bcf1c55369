#pragma once

// Stands in for llama.cpp's file of this name where kernels of ours run in the emulator: what they use of it.

#include "cuda.h"

#define WARP_SIZE 32

static inline void ggml_cuda_pdl_sync() {}

using cudaStream_t = void *;

// Of the device, which a test may change.
struct ggml_cuda_device_info {
    struct {
        int    cc;
        int    nsm;
        size_t smpbo; // most bytes of shared memory of a block
    } devices[1];
};
inline ggml_cuda_device_info simt_device = { { { 860, 4, 99*1024 } } };
inline const ggml_cuda_device_info & ggml_cuda_info() { return simt_device; }
#define CUDA_SET_SHARED_MEMORY_LIMIT(kernel, bytes) ((void) (kernel), (void) (bytes))

struct ggml_cuda_pool {};
template<typename T> struct ggml_cuda_pool_alloc { // poisoned, between pages that no access survives
    simt::output<T> memory;
    ggml_cuda_pool_alloc(ggml_cuda_pool &, size_t n) : memory(n, alignof(T) < 16 ? 16 : alignof(T)) {}
    T * get() { return memory.data(); }
};

struct ggml_backend_cuda_context {
    int device = 0, curr_stream_no = 0;
    ggml_cuda_pool memory;
    ggml_cuda_pool & pool() { return memory; }
    cudaStream_t stream() { return nullptr; }
};
