#pragma once

// The SIMD helpers of the instruction set that this target is compiled for:
//
//   trellis search, on vectors of TURBO_LANES path costs:
//     turbo_u16_{set1,store,min,sub,add_sat,smallest}
//     turbo_u16_step_cost   (target - entry)^2 * 2 / 2^16, rounded, the difference saturating
//     turbo_u16_entries     codebook entries * 256
//     turbo_u16_spread      costs of the best paths by shared bits -> the same by state, in by_low's order
//     turbo_u16_fold        minimum of both halves (only where a vector holds more than 16 lanes)
//     turbo_u16x8_{costs,first4,argmin}   the same on 8 states at a time; argmin gives value << 16 | index
//   decoder, on the 64 values of a block:
//     turbo_entries         codebook entries of all values
//     turbo_store_scaled    entries * scale as floats
//     turbo_sum_{zero,dot,total}   sums of dot products with two q8_0 blocks
//   attention and rotation, on vectors of TURBO_F32_LANES floats or words of 4 bytes:
//     turbo_f32_{load,store,set1,add,sub,mul,fma,max,round,from_half,from_i32,total,largest}
//     turbo_f32_scale2      x * 2^n
//     turbo_f32_zero_below  y, but 0 where x < limit
//     turbo_f32_butterfly   lanes a `distance` apart become their sum and their difference
//     turbo_store_keys      entries as bytes, TURBO_KEY_BIAS added
//     turbo_i32_{load,set1}, turbo_i32_dot4   sum + dot product of each word's 4 key bytes with 4 query bytes
//     turbo_store_values    entries of two keys as words of 16 bits and 16 bits, for the following
//     turbo_i32_dot2        sum + dot product of each word's two entries with two weights of 16 bits
//     turbo_f32_store_int16 rounded and saturated
//     turbo_prefetch        asks for the memory at an address, which need not exist
//     turbo_transpose       TURBO_F32_LANES x TURBO_F32_LANES words
//
// TURBO_LANES is not defined where there are none; the scalar reference then does the work.

#include "ggml-turbo.h"

// Visual C++ has no names for FMA and F16C, which all have that have AVX2.
#if defined(__AVX2__) && (defined(_MSC_VER) || (defined(__FMA__) && defined(__F16C__)))
#  define TURBO_HAS_AVX2
#endif

#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && defined(__AVX512VBMI__)
#  include "turbo-simd-avx512.h"
#elif defined(TURBO_HAS_AVX2)
#  include "turbo-simd-avx2.h"
#elif defined(__ARM_NEON) && defined(__aarch64__)
#  include "turbo-simd-neon.h"
#else
#  define TURBO_SIMD "scalar"
#endif
