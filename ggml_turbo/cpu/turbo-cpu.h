#pragma once

// turbo types on the CPU: the same bits as ggml-turbo.c, with the instruction set this file's target is compiled for.

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

// n_blocks blocks of 64 values each, with any codec of 2, 3 or 4 bits.
TURBO_CPU_API void turbo_quantize_blocks_cpu(const turbo_codec * codec, const float * x, uint8_t * blocks, int64_t n_blocks);

// x: n floats, y: n/64 blocks.
TURBO_CPU_API void quantize_row_turbo2(const float * x, void * y, int64_t n);
TURBO_CPU_API void quantize_row_turbo3(const float * x, void * y, int64_t n);
TURBO_CPU_API void quantize_row_turbo4(const float * x, void * y, int64_t n);

// x: n/64 blocks, y: n floats.
TURBO_CPU_API void dequantize_row_turbo2_cpu(const void * x, float * y, int64_t n);
TURBO_CPU_API void dequantize_row_turbo3_cpu(const void * x, float * y, int64_t n);
TURBO_CPU_API void dequantize_row_turbo4_cpu(const void * x, float * y, int64_t n);

// s[0] = dot product of n turbo values x and n q8_0 values y; the strides bs, bx, by and nrc = 1 are ggml's.
TURBO_CPU_API void ggml_vec_dot_turbo2_q8_0(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy,
                                            size_t by, int nrc);
TURBO_CPU_API void ggml_vec_dot_turbo3_q8_0(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy,
                                            size_t by, int nrc);
TURBO_CPU_API void ggml_vec_dot_turbo4_q8_0(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy,
                                            size_t by, int nrc);

// The instruction set in use: "avx512", "avx2", "neon" or "scalar".
TURBO_CPU_API const char * turbo_cpu_simd(void);

#ifdef __cplusplus
}
#endif
