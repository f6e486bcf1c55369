#pragma once

// Stands in for llama.cpp's file of this name.

#include "ggml-cuda/common.cuh"

template<typename T> using to_t_cuda_t = void (*)(const void * x, T * y, int64_t k, cudaStream_t stream);
using to_fp32_cuda_t = to_t_cuda_t<float>;
using to_fp16_cuda_t = to_t_cuda_t<half>;
using to_bf16_cuda_t = to_t_cuda_t<nv_bfloat16>;

template<typename T>
using to_t_nc_cuda_t = void (*)(const void * x, T * y, int64_t ne00, int64_t ne01, int64_t ne02, int64_t ne03,
                                int64_t s01, int64_t s02, int64_t s03, cudaStream_t stream);
using to_fp32_nc_cuda_t = to_t_nc_cuda_t<float>;
using to_fp16_nc_cuda_t = to_t_nc_cuda_t<half>;
using to_bf16_nc_cuda_t = to_t_nc_cuda_t<nv_bfloat16>;
