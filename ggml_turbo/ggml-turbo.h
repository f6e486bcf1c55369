#pragma once

// turbo2, turbo3, turbo4: trellis-coded quantization types for key and value caches.
//
// A block holds QK_TURBO = 64 consecutive values in 2 + 8k bytes, k = 2, 3, 4 bits a value:
//
//   bit 0        8+k        16                                  16+64k     (least significant bit first)
//       | scale   | start    | code 0 | code 1 | ... | code 63 |
//         8+k bits  8-k bits   k bits   k bits         k bits
//
// Value i is read from its own window of 8 bits, its trellis state: the bits 8 + k(i+1) .. 16 + k(i+1),
// that is code i on top of the codes before it (of the start bits, for the first values):
//
//   y[i] = scale * codebook[window(i)]
//
// Decoding is random access; encoding is a Viterbi search over the 256 states. The scale is an unsigned
// minifloat, 6 bits of exponent and k+2 bits of mantissa; code 0 is zero:
//
//   scale = 2^(exponent - TURBO_SCALE_BIAS) * (1 + mantissa / 2^(k+2))
//
// codebook[w] = a[w & 15] + b[(w >> 4) ^ p[w & 15]] is built of three tables of 16 entries, so that
// it is three byte shuffles on any SIMD instruction set. turbo-tables.h holds them; tools/codebook makes it.
//
// ggml-turbo.c is the definition: every other implementation decodes to the same bits and encodes
// the same values to the same bytes.

#include <stddef.h>
#include <stdint.h>

#ifdef GGML_TURBO_STANDALONE // without ggml: tests and the codebook trainer
#  define TURBO_API
#else
#  include "ggml.h"
#  define TURBO_API GGML_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define QK_TURBO         64  // values in a block
#define TURBO_STATES     256 // trellis states: windows of 8 bits
#define TURBO_SCALE_BIAS 40

#define TURBO_BLOCK_BYTES(k) (2 + (k)*QK_TURBO/8)

typedef struct { uint8_t bytes[TURBO_BLOCK_BYTES(2)]; } block_turbo2;
typedef struct { uint8_t bytes[TURBO_BLOCK_BYTES(3)]; } block_turbo3;
typedef struct { uint8_t bytes[TURBO_BLOCK_BYTES(4)]; } block_turbo4;

// All that tells one type from another.
typedef struct {
    int    bits;                      // k
    float  rms_to_scale;              // the encoder's first guess of the scale is the larger of
    float  max_to_scale;              // rms(x) * rms_to_scale and max|x| * max_to_scale
    float  mse;                       // mean squared error on N(0,1), measured by tools/codebook on held-out data
    int8_t a[16], b[16], p[16];       // what the codebook is built of
    int8_t codebook[TURBO_STATES];
    int8_t by_low[TURBO_STATES];      // codebook[u << k | t] at [t << (8-k) | u]: the order of a SIMD search
} turbo_codec;

TURBO_API const turbo_codec * turbo_get_codec(int bits); // bits 2, 3, 4; otherwise NULL

// One block: 64 values x, TURBO_BLOCK_BYTES(codec->bits) bytes. NaN is taken as 0, an infinity as the largest
// finite magnitude of its block; magnitudes that the scale cannot reach saturate (2^29) or become 0 (2^-40).
TURBO_API void turbo_quantize_block  (const turbo_codec * codec, const float * x, uint8_t * block);
TURBO_API void turbo_dequantize_block(const turbo_codec * codec, const uint8_t * block, float * y);

// The scale stored in a block.
TURBO_API float turbo_block_scale(int bits, const uint8_t * block);

// As ggml's tables of types want them; n, the number of values, is a multiple of QK_TURBO.
TURBO_API void quantize_row_turbo2_ref(const float * x, block_turbo2 * y, int64_t n);
TURBO_API void quantize_row_turbo3_ref(const float * x, block_turbo3 * y, int64_t n);
TURBO_API void quantize_row_turbo4_ref(const float * x, block_turbo4 * y, int64_t n);

TURBO_API void dequantize_row_turbo2(const block_turbo2 * x, float * y, int64_t n);
TURBO_API void dequantize_row_turbo3(const block_turbo3 * x, float * y, int64_t n);
TURBO_API void dequantize_row_turbo4(const block_turbo4 * x, float * y, int64_t n);

// nrows rows of n_per_row values; imatrix is not used (the codes are searched for the smallest squared error);
// returns the bytes written.
TURBO_API size_t quantize_turbo2(const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix);
TURBO_API size_t quantize_turbo3(const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix);
TURBO_API size_t quantize_turbo4(const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix);

#ifdef __cplusplus
}
#endif
