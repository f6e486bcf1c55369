#pragma once

// turbo2, turbo3, turbo4: trellis-coded quantization types for key and value caches. README.md has the format,
// turbo-block.h its arithmetic, turbo-reference.c the functions that define it: every other implementation decodes to
// the same bits, and every one on a CPU encodes the same values to the same bytes.

#include "tables/turbo-types.h"
#include "turbo-block.h"

#include <stddef.h>
#include <stdint.h>

#ifdef GGML_TURBO_STANDALONE // without ggml: tests, the codebook trainer, the writer of vectors.bin
#  define TURBO_API
#else
#  include "ggml.h"
#  define TURBO_API GGML_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

// A block: block_turbo2, block_turbo3, ...
#define TURBO_BLOCK(K, ID)                                                  \
    TURBO_ASSERT_BITS(K);                                                   \
    typedef struct { uint8_t bytes[TURBO_BLOCK_BYTES(K)]; } block_turbo##K; \
    TURBO_ASSERT(sizeof(block_turbo##K) == 2 + 8*(K), "blocks have no padding");
TURBO_TYPES(TURBO_BLOCK)
#undef TURBO_BLOCK

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

TURBO_API const turbo_codec * turbo_get_codec(int bits); // of the type with as many bits a code; NULL if there is none

// One block: 64 values x, TURBO_BLOCK_BYTES(codec->bits) bytes. NaN is taken as 0, an infinity as the largest
// finite magnitude of its block; magnitudes that the scale cannot reach saturate (2^29) or become 0 (2^-40).
TURBO_API void turbo_quantize_block  (const turbo_codec * codec, const float * x, uint8_t * block);
TURBO_API void turbo_dequantize_block(const turbo_codec * codec, const uint8_t * block, float * y);

// The scale stored in a block.
TURBO_API float turbo_block_scale(int bits, const uint8_t * block);

// As ggml's tables of types want them: quantize_row_turbo2_ref, dequantize_row_turbo2, quantize_turbo2, ... n, the
// number of values, is a multiple of QK_TURBO. quantize_turbo2 takes nrows rows of n_per_row values and returns the
// bytes written; it does not use imatrix (the codes are searched for the smallest squared error).
#define TURBO_DECLARE_ROWS(K, ID)                                                                                   \
    TURBO_API void   quantize_row_turbo##K##_ref(const float * x, block_turbo##K * y, int64_t n);                   \
    TURBO_API void   dequantize_row_turbo##K(const block_turbo##K * x, float * y, int64_t n);                       \
    TURBO_API size_t quantize_turbo##K(const float * src, void * dst, int64_t nrows, int64_t n_per_row,             \
                                       const float * imatrix);
TURBO_TYPES(TURBO_DECLARE_ROWS)
#undef TURBO_DECLARE_ROWS

#ifndef GGML_TURBO_STANDALONE

// Bits of a code of a turbo type; 0 for any other type.
static inline int turbo_bits(enum ggml_type type) {
#define TURBO_RETURN_BITS(K, ID) case GGML_TYPE_TURBO##K: return K;
    switch (type) {
        TURBO_TYPES(TURBO_RETURN_BITS)
        default: return 0;
    }
#undef TURBO_RETURN_BITS
}

static inline bool turbo_is_type(enum ggml_type type) {
    return turbo_bits(type) != 0;
}

#endif

#ifdef __cplusplus
}
#endif
