#pragma once

// The steps of the encoder around its trellis search, shared by the reference and the SIMD versions.
//
// All of it is exact arithmetic: integers, and single float operations in a stated order that every IEEE machine
// rounds alike. So SIMD versions can be, and are tested to be, identical to the last bit. What acts on single values
// stands in turbo-block.h; here are the loops over a block and their order.
// (Compile with -ffp-contract=off: a fused multiply-add rounds once where this file rounds twice.)

#include "ggml-turbo.h"

#include <math.h>
#include <string.h>

#define TURBO_MAX_SHARED TURBO_SHARED(TURBO_FEWEST_BITS)

// best[i][u], u < 2^(8-k): the smallest cost of a path over the first i values that can go on to a state with
// the low bits u. SIMD loads and stores may reach past the last row's end.
typedef struct {
    uint16_t best[QK_TURBO + 1][TURBO_MAX_SHARED];
    uint16_t past_the_end[16];
} turbo_paths;

// What a search works on: one candidate for the scale of one block.
typedef struct {
    int         scale_code;
    int16_t     target[QK_TURBO]; // the values in codebook units, 8 fractional bits
    float       energy;           // of the values: the sum of their squares
    turbo_paths paths;
    uint32_t    cost;             // of the best path
} turbo_candidate;

// Searches have to wait for their own last step, so two go side by side; so do two tracebacks, of different blocks.

// Fills paths and cost of both candidates from their targets.
typedef void (*turbo_search_t)(const turbo_codec * codec, turbo_candidate * candidates);

// The states of the best paths of n candidates, 1 or 2; ties go to the smaller state.
typedef void (*turbo_traceback_t)(const turbo_codec * codec, int n, const turbo_candidate * const * candidates,
                                  uint8_t states[][QK_TURBO]);

// ---- floats and their bits ----

static inline uint32_t turbo_float_to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
}

static inline float turbo_bits_to_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

static inline float turbo_scale_value(int bits, int code) {
    return turbo_bits_to_float(turbo_scale_to_float(bits, code));
}

static inline int turbo_scale_code(int bits, float scale) {
    return turbo_scale_from_float(bits, turbo_float_to_bits(scale));
}

static inline float turbo_stored_scale(int bits, const uint8_t * block) {
    return turbo_scale_value(bits, turbo_header_scale(bits, block[0] | block[1] << 8));
}

// ---- from values to search targets ----

// x without NaN, infinities and what overflows; returns the largest magnitude.
static inline float turbo_sanitize_block(const float * x, float * clean) {
    int largest = 0;
    for (int i = 0; i < QK_TURBO; ++i) {
        largest = turbo_largest(largest, turbo_float_to_bits(x[i]));
    }
    largest = largest < TURBO_MAX_INPUT ? largest : TURBO_MAX_INPUT;
    for (int i = 0; i < QK_TURBO; ++i) {
        clean[i] = turbo_bits_to_float(turbo_sanitize(turbo_float_to_bits(x[i]), largest));
    }
    return turbo_bits_to_float((uint32_t) largest);
}

// The sum of squares; 16 partial sums, then halves onto halves: the order of a 16-lane register.
static inline float turbo_energy(const float * x) {
    TURBO_ASSERT(QK_TURBO % 16 == 0, "each partial sum has as many terms");
    float sum[16] = {0};
    for (int i = 0; i < QK_TURBO; i += 16) {
        for (int lane = 0; lane < 16; ++lane) {
            sum[lane] += x[i + lane]*x[i + lane];
        }
    }
    for (int half = 8; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) {
            sum[lane] += sum[lane + half];
        }
    }
    return sum[0];
}

// x in codebook units, 8 fractional bits.
static inline void turbo_targets(const float * x, float scale, int16_t * target) {
    const float to_units = 256.0f / scale;
    for (int i = 0; i < QK_TURBO; ++i) {
        target[i] = (int16_t) rintf(turbo_limit_target(x[i]*to_units));
    }
}

// ---- from states to a block ----

// Whether a code above this one has the scale that entries with the squared norm cc need for this energy. The square is
// exact, the product rounded once.
static inline int turbo_scale_is_above(int bits, int code, float energy, float cc) {
    const float end = turbo_bits_to_float(turbo_scale_end(bits, code));
    return energy >= end*end*cc;
}

// The code of the scale with which the chosen codebook entries have the norm of the values. The two comparisons decide:
// of the division and the square root before them it is enough that they come within one code.
static inline int turbo_fit_scale(const turbo_codec * codec, float energy, const uint8_t * states, int code) {
    int32_t sum = 0;
    for (int i = 0; i < QK_TURBO; ++i) {
        const int c = codec->codebook[states[i]];
        sum += c*c;
    }
    if (sum == 0) {
        return code;
    }
    const int   bits   = codec->bits, last = TURBO_SCALE_CODES(codec->bits) - 1;
    const float cc     = (float) sum;
    const int   fitted = turbo_scale_code(bits, sqrtf(energy/cc));
    if (fitted > 0 && !turbo_scale_is_above(bits, fitted - 1, energy, cc)) {
        return fitted - 1;
    }
    return fitted + (fitted < last && turbo_scale_is_above(bits, fitted, energy, cc));
}

static inline void turbo_pack(int bits, int scale_code, const uint8_t * states, uint8_t * block) {
    const int header = turbo_header(bits, scale_code, states[0]);
    *block++ = header & 0xff;
    *block++ = header >> 8;
    for (int i = 0; i < QK_TURBO; i += 8) {
        uint32_t codes = 0;
        for (int j = 0; j < 8; ++j) {
            codes |= (uint32_t) turbo_state_code(bits, states[i + j]) << (bits*j);
        }
        for (int j = 0; j < bits; ++j) {
            *block++ = (codes >> (8*j)) & 0xff;
        }
    }
}

// ---- the whole of it ----

// Chooses two candidates for the scale, searches both and returns the better one; NULL for a block of zeros.
static inline const turbo_candidate * turbo_best_candidate(const turbo_codec * codec, const float * x,
                                                           turbo_candidate * candidates, turbo_search_t search) {
    static const float around_guess[2] = { 0.94f, 1.06f };

    float       clean[QK_TURBO], scale[2];
    const float max_abs = turbo_sanitize_block(x, clean);
    const float energy  = turbo_energy(clean);
    const float by_rms  = sqrtf(energy/QK_TURBO)*codec->rms_to_scale;
    const float by_max  = max_abs*codec->max_to_scale;
    const float guess   = by_rms > by_max ? by_rms : by_max;
    for (int j = 0; j < 2; ++j) {
        candidates[j].scale_code = turbo_scale_code(codec->bits, guess*around_guess[j]);
        if (candidates[j].scale_code == 0) {
            return NULL;
        }
        scale[j] = turbo_scale_value(codec->bits, candidates[j].scale_code);
        candidates[j].energy = energy;
        turbo_targets(clean, scale[j], candidates[j].target);
    }
    search(codec, candidates);
    const float error0 = (float) candidates[0].cost*(scale[0]*scale[0]);
    const float error1 = (float) candidates[1].cost*(scale[1]*scale[1]);
    return &candidates[error1 < error0];
}

// 1 or 2 blocks.
static inline void turbo_encode_blocks(const turbo_codec * codec, int n_blocks, const float * x, uint8_t * blocks,
                                       turbo_search_t search, turbo_traceback_t traceback) {
    const int               size = TURBO_BLOCK_BYTES(codec->bits);
    turbo_candidate         candidates[2][2];
    const turbo_candidate * best[2];
    uint8_t *               block[2];
    uint8_t                 states[2][QK_TURBO];

    int n = 0; // blocks that are not all zeros
    for (int i = 0; i < n_blocks; ++i) {
        block[n] = blocks + i*size;
        best[n]  = turbo_best_candidate(codec, x + i*QK_TURBO, candidates[n], search);
        if (best[n]) {
            ++n;
        } else {
            memset(block[n], 0, size);
        }
    }
    traceback(codec, n, best, states);
    for (int i = 0; i < n; ++i) {
        const int scale_code = turbo_fit_scale(codec, best[i]->energy, states[i], best[i]->scale_code);
        turbo_pack(codec->bits, scale_code, states[i], block[i]);
    }
}
