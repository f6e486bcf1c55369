#pragma once

// The SIMD helpers (turbo-simd.h says what each does) for 64-bit Arm NEON; dot products with the extension where there is one.

#include <arm_neon.h>

#include "turbo-states.h"

#define TURBO_SIMD  "neon"
#define TURBO_LANES 8

static inline void turbo_prefetch(const void * p) {
    __builtin_prefetch(p);
}

// ---- trellis search ----

typedef uint16x8_t turbo_u16;

static inline turbo_u16 turbo_u16_set1(uint16_t x)                  { return vdupq_n_u16(x); }
static inline void      turbo_u16_store(uint16_t * p, turbo_u16 x)  { vst1q_u16(p, x); }
static inline turbo_u16 turbo_u16_min(turbo_u16 a, turbo_u16 b)     { return vminq_u16(a, b); }
static inline turbo_u16 turbo_u16_sub(turbo_u16 a, turbo_u16 b)     { return vsubq_u16(a, b); }
static inline turbo_u16 turbo_u16_add_sat(turbo_u16 a, turbo_u16 b) { return vqaddq_u16(a, b); }
static inline uint16_t  turbo_u16_smallest(turbo_u16 x)             { return vminvq_u16(x); }

static inline turbo_u16 turbo_u16_step_cost(turbo_u16 target, turbo_u16 entry) {
    const int16x8_t d = vqsubq_s16(vreinterpretq_s16_u16(target), vreinterpretq_s16_u16(entry));
    // (d*d + 2^14) >> 15; the rounding doubling multiplication would saturate at d = -32768
    const int32x4_t low = vmull_s16(vget_low_s16(d), vget_low_s16(d)), high = vmull_high_s16(d, d);
    return vcombine_u16(vrshrn_n_u32(vreinterpretq_u32_s32(low), 15), vrshrn_n_u32(vreinterpretq_u32_s32(high), 15));
}

static inline turbo_u16 turbo_u16_entries(const int8_t * p) {
    return vreinterpretq_u16_s16(vshll_n_s8(vld1_s8(p), 8));
}

static inline void turbo_u16_spread(int bits, const turbo_u16 * best, turbo_u16 * spread) {
    uint16_t row[64];
    if (bits == 4) { // states 16*(8*(v % 2) + lane) + v/2: low bits v/2
        vst1q_u16(row, best[0]);
        vst1q_u16(row + 8, best[1]);
        for (int v = 0; v < 32; ++v) {
            spread[v] = vdupq_n_u16(row[v/2]);
        }
    } else if (bits == 3) { // states 8*lane + t: low bits 8*(lane % 4) + t; a transposition of 4 x 8
        const uint16x8x4_t rows = { { best[0], best[1], best[2], best[3] } };
        vst4q_u16(row, rows);
        for (int v = 0; v < 32; ++v) {
            const uint16x4_t quad = vld1_u16(row + 4*(v/4));
            spread[v] = vcombine_u16(quad, quad);
        }
    } else { // states 4*(16*j + lane) + t: low bits 4*lane + t; a transposition of 16 x 4
        for (int v = 0; v < 8; ++v) {
            vst1q_u16(row + 8*v, best[v]);
        }
        const uint16x8x4_t low = vld4q_u16(row), high = vld4q_u16(row + 32);
        for (int v = 0; v < 32; v += 2) {
            spread[v]     = low.val[v/8];
            spread[v + 1] = high.val[v/8];
        }
    }
}

typedef uint16x8_t turbo_u16x8;

static inline turbo_u16x8 turbo_u16x8_costs(int16_t target, const int8_t * entries, const uint16_t * best) {
    return vqaddq_u16(vld1q_u16(best), turbo_u16_step_cost(vdupq_n_u16((uint16_t) target), turbo_u16_entries(entries)));
}

static inline turbo_u16x8 turbo_u16x8_first4(turbo_u16x8 x) { // the other lanes become the largest
    return vcombine_u16(vget_low_u16(x), vdup_n_u16(UINT16_MAX));
}

static inline uint32_t turbo_u16x8_argmin(turbo_u16x8 x) {
    const uint16x8_t lane  = { 0, 1, 2, 3, 4, 5, 6, 7 };
    const uint16_t   value = vminvq_u16(x);
    const uint16_t   index = vminvq_u16(vornq_u16(lane, vceqq_u16(x, vdupq_n_u16(value))));
    return (uint32_t) value << 16 | index;
}

// ---- decoder ----

typedef struct { int8x16_t quarter[4]; } turbo_i8x64;

// States of the values 16*g .. 16*g + 15.
static inline uint8x16_t turbo_states(int bits, int g, const uint8_t * block) {
    const uint8x16_t bytes = vld1q_u8(block + TURBO_STATE_LOAD(bits, g));
    uint16x8_t parity[2];
    for (int odd = 0; odd < 2; ++odd) {
        const uint16x8_t pairs = vreinterpretq_u16_u8(vqtbl1q_u8(bytes, vld1q_u8(turbo_state_bytes[bits - TURBO_FEWEST_BITS][odd][g])));
        parity[odd] = vmulq_u16(pairs, vld1q_u16(turbo_state_factors[bits - TURBO_FEWEST_BITS][odd]));
    }
    return vreinterpretq_u8_u16(vsriq_n_u16(parity[1], parity[0], 8));
}

// Entries of 16 states, given by the low and the high halves of their bits.
static inline int8x16_t turbo_entries_of(const turbo_codec * codec, uint8x16_t low, uint8x16_t high) {
    const uint8x16_t p = vreinterpretq_u8_s8(vld1q_s8(codec->p));
    return vaddq_s8(vqtbl1q_s8(vld1q_s8(codec->a), low), vqtbl1q_s8(vld1q_s8(codec->b), veorq_u8(high, vqtbl1q_u8(p, low))));
}

static inline turbo_i8x64 turbo_entries(const turbo_codec * codec, int bits, const uint8_t * block) {
    const uint8x16_t nibble = vdupq_n_u8(15);
    turbo_i8x64 c;
    if (bits == 4) { // a state is two neighbouring nibbles: of one byte for odd values, across two for even ones
        for (int half = 0; half < 2; ++half) {
            const uint8x16_t bytes = vld1q_u8(block + 2 + 16*half), before = vld1q_u8(block + 1 + 16*half);
            const uint8x16_t low   = vandq_u8(bytes, nibble);
            const int8x16_t  even  = turbo_entries_of(codec, vshrq_n_u8(before, 4), low);
            const int8x16_t  odd   = turbo_entries_of(codec, low, vshrq_n_u8(bytes, 4));
            c.quarter[2*half]     = vzip1q_s8(even, odd);
            c.quarter[2*half + 1] = vzip2q_s8(even, odd);
        }
        return c;
    }
    for (int g = 0; g < 4; ++g) {
        const uint8x16_t w = turbo_states(bits, g, block);
        c.quarter[g] = turbo_entries_of(codec, vandq_u8(w, nibble), vshrq_n_u8(w, 4));
    }
    return c;
}

static inline void turbo_store_scaled(turbo_i8x64 c, float scale, float * y) {
    for (int g = 0; g < 4; ++g) {
        const int16x8_t low = vmovl_s8(vget_low_s8(c.quarter[g])), high = vmovl_high_s8(c.quarter[g]);
        vst1q_f32(y + 16*g +  0, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), scale));
        vst1q_f32(y + 16*g +  4, vmulq_n_f32(vcvtq_f32_s32(vmovl_high_s16(low)), scale));
        vst1q_f32(y + 16*g +  8, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), scale));
        vst1q_f32(y + 16*g + 12, vmulq_n_f32(vcvtq_f32_s32(vmovl_high_s16(high)), scale));
    }
}

typedef float32x4_t turbo_sum;

static inline turbo_sum turbo_sum_zero(void)         { return vdupq_n_f32(0.0f); }
static inline float     turbo_sum_total(turbo_sum x) { return vaddvq_f32(x); }

static inline int32x4_t turbo_dot16(int32x4_t sum, int8x16_t c, int8x16_t q) {
#ifdef __ARM_FEATURE_DOTPROD
    return vdotq_s32(sum, c, q);
#else
    return vpadalq_s16(vpadalq_s16(sum, vmull_s8(vget_low_s8(c), vget_low_s8(q))), vmull_high_s8(c, q));
#endif
}

static inline turbo_sum turbo_sum_dot(turbo_sum sum, turbo_i8x64 c, const int8_t * q0, const int8_t * q1, float d0, float d1) {
    const int32x4_t zero = vdupq_n_s32(0);
    const int32x4_t dot0 = turbo_dot16(turbo_dot16(zero, c.quarter[0], vld1q_s8(q0)), c.quarter[1], vld1q_s8(q0 + 16));
    const int32x4_t dot1 = turbo_dot16(turbo_dot16(zero, c.quarter[2], vld1q_s8(q1)), c.quarter[3], vld1q_s8(q1 + 16));
    return vfmaq_n_f32(vfmaq_n_f32(sum, vcvtq_f32_s32(dot0), d0), vcvtq_f32_s32(dot1), d1);
}

// ---- attention ----

typedef float32x4_t turbo_f32;
typedef int32x4_t   turbo_i32;

#define TURBO_F32_LANES   4
#define TURBO_SCORE_KEYS  4 // vectors of keys and of values that a step keeps in registers, for each of 4 queries
#define TURBO_VALUE_STEP  4
#define TURBO_KEY_BIAS    0

static inline turbo_f32 turbo_f32_load(const float * p)                          { return vld1q_f32(p); }
static inline void      turbo_f32_store(float * p, turbo_f32 x)                  { vst1q_f32(p, x); }
static inline turbo_f32 turbo_f32_set1(float x)                                  { return vdupq_n_f32(x); }
static inline turbo_f32 turbo_f32_add(turbo_f32 a, turbo_f32 b)                  { return vaddq_f32(a, b); }
static inline turbo_f32 turbo_f32_mul(turbo_f32 a, turbo_f32 b)                  { return vmulq_f32(a, b); }
static inline turbo_f32 turbo_f32_fma(turbo_f32 a, turbo_f32 b, turbo_f32 c)     { return vfmaq_f32(c, a, b); }
static inline turbo_f32 turbo_f32_max(turbo_f32 a, turbo_f32 b)                  { return vmaxq_f32(a, b); }
static inline turbo_f32 turbo_f32_round(turbo_f32 x)                             { return vrndnq_f32(x); }
static inline turbo_f32 turbo_f32_from_half(const uint16_t * p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
static inline turbo_f32 turbo_f32_from_i32(turbo_i32 x)                          { return vcvtq_f32_s32(x); }
static inline float     turbo_f32_total(turbo_f32 x)                             { return vaddvq_f32(x); }
static inline float     turbo_f32_largest(turbo_f32 x)                           { return vmaxvq_f32(x); }

static inline turbo_f32 turbo_f32_scale2(turbo_f32 x, turbo_f32 n) { // n of at least -126
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(x), vshlq_n_s32(vcvtnq_s32_f32(n), 23)));
}

static inline turbo_f32 turbo_f32_zero_below(turbo_f32 y, turbo_f32 x, turbo_f32 limit) {
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(y), vcltq_f32(x, limit)));
}

static inline turbo_f32 turbo_f32_sub(turbo_f32 a, turbo_f32 b)                  { return vsubq_f32(a, b); }

static inline turbo_f32 turbo_f32_butterfly(turbo_f32 x, int distance) {
    const uint32x4_t  odd = { 0, UINT32_MAX, 0, UINT32_MAX }, high = { 0, 0, UINT32_MAX, UINT32_MAX };
    const float32x4_t partner = distance == 1 ? vrev64q_f32(x) : vextq_f32(x, x, 2);
    return vbslq_f32(distance == 1 ? odd : high, vsubq_f32(partner, x), vaddq_f32(x, partner));
}

static inline turbo_i32 turbo_i32_load(const void * p)  { return vld1q_s32((const int32_t *) p); }
static inline turbo_i32 turbo_i32_set1(int32_t x)       { return vdupq_n_s32(x); }

static inline turbo_i32 turbo_i32_dot4(turbo_i32 sum, turbo_i32 keys, int32_t query) {
    const int8x16_t k = vreinterpretq_s8_s32(keys), q = vreinterpretq_s8_s32(vdupq_n_s32(query));
#ifdef __ARM_FEATURE_DOTPROD
    return vdotq_s32(sum, k, q);
#else
    const int16x8_t low = vmull_s8(vget_low_s8(k), vget_low_s8(q)), high = vmull_high_s8(k, q);
    return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
}

static inline void turbo_store_keys(turbo_i8x64 c, void * p) {
    for (int g = 0; g < 4; ++g) {
        vst1q_s8((int8_t *) p + 16*g, c.quarter[g]);
    }
}

// 4 values of one key, then of the other
static inline void turbo_store_values(turbo_i8x64 c0, turbo_i8x64 c1, void * p) {
    int16_t * to = (int16_t *) p;
    for (int g = 0; g < 4; ++g, to += 32) {
        const int16x8_t low0  = vmovl_s8(vget_low_s8(c0.quarter[g])), low1  = vmovl_s8(vget_low_s8(c1.quarter[g]));
        const int16x8_t high0 = vmovl_high_s8(c0.quarter[g]),         high1 = vmovl_high_s8(c1.quarter[g]);
        vst1q_s16(to +  0, vcombine_s16(vget_low_s16(low0),   vget_low_s16(low1)));
        vst1q_s16(to +  8, vcombine_s16(vget_high_s16(low0),  vget_high_s16(low1)));
        vst1q_s16(to + 16, vcombine_s16(vget_low_s16(high0),  vget_low_s16(high1)));
        vst1q_s16(to + 24, vcombine_s16(vget_high_s16(high0), vget_high_s16(high1)));
    }
}

static inline turbo_i32 turbo_i32_dot2(turbo_i32 sum, turbo_i32 values, int32_t weights) {
    const int16x8_t v = vreinterpretq_s16_s32(values);
    const int16x4_t w = vreinterpret_s16_s32(vdup_n_s32(weights));
    return vmlal_high_lane_s16(vmlal_lane_s16(sum, vget_low_s16(v), w, 0), v, w, 1);
}

static inline void turbo_f32_store_int16(int16_t * p, turbo_f32 x) {
    vst1_s16(p, vqmovn_s32(vcvtnq_s32_f32(x)));
}

static inline void turbo_transpose(const int32_t * from, int64_t from_stride, int32_t * to, int64_t to_stride) {
    const int32x4_t r0 = vld1q_s32(from),                 r1 = vld1q_s32(from + from_stride);
    const int32x4_t r2 = vld1q_s32(from + 2*from_stride), r3 = vld1q_s32(from + 3*from_stride);
    const int64x2_t s0 = vreinterpretq_s64_s32(vtrn1q_s32(r0, r1)), s1 = vreinterpretq_s64_s32(vtrn2q_s32(r0, r1));
    const int64x2_t s2 = vreinterpretq_s64_s32(vtrn1q_s32(r2, r3)), s3 = vreinterpretq_s64_s32(vtrn2q_s32(r2, r3));
    vst1q_s32(to + 0*to_stride, vreinterpretq_s32_s64(vtrn1q_s64(s0, s2)));
    vst1q_s32(to + 1*to_stride, vreinterpretq_s32_s64(vtrn1q_s64(s1, s3)));
    vst1q_s32(to + 2*to_stride, vreinterpretq_s32_s64(vtrn2q_s64(s0, s2)));
    vst1q_s32(to + 3*to_stride, vreinterpretq_s32_s64(vtrn2q_s64(s1, s3)));
}
