#pragma once

// turbo types on the CPU: the same bits as turbo-reference.c, with the instruction set that this file's target is
// compiled for.

#include "ggml-turbo.h"

#ifdef GGML_TURBO_STANDALONE
#  define TURBO_CPU_API
#else
#  include "ggml-backend.h"
#  define TURBO_CPU_API GGML_BACKEND_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

// n_blocks blocks of 64 values each, with any codec of as many bits as a type has.
TURBO_CPU_API void turbo_quantize_blocks_cpu(const turbo_codec * codec, const float * x, uint8_t * blocks, int64_t n_blocks);

// quantize_row_turbo2, ...: x: n floats, y: n/64 blocks.
// dequantize_row_turbo2_cpu, ...: x: n/64 blocks, y: n floats.
// ggml_vec_dot_turbo2_q8_0, ...: s[0] = dot product of n turbo values x and n q8_0 values y; the strides bs, bx, by and
// nrc = 1 are ggml's.
#define TURBO_DECLARE_CPU(K, ID)                                                                                   \
    TURBO_CPU_API void quantize_row_turbo##K(const float * x, void * y, int64_t n);                                \
    TURBO_CPU_API void dequantize_row_turbo##K##_cpu(const void * x, float * y, int64_t n);                        \
    TURBO_CPU_API void ggml_vec_dot_turbo##K##_q8_0(int n, float * s, size_t bs, const void * vx, size_t bx,       \
                                                    const void * vy, size_t by, int nrc);
TURBO_TYPES(TURBO_DECLARE_CPU)
#undef TURBO_DECLARE_CPU

// The instruction set in use: "avx512", "avx2", "neon" or "scalar".
TURBO_CPU_API const char * turbo_cpu_simd(void);

#ifdef __cplusplus
}
#endif
