#pragma once

// The SIMD helpers (turbo-simd.h says what each does) for AVX-512 with BW, VL and VBMI; VNNI where there is one.

#include "turbo-simd-sse.h"

#define TURBO_SIMD  "avx512"
#define TURBO_LANES 32

// ---- trellis search ----

typedef __m512i turbo_u16;

static inline turbo_u16 turbo_u16_set1(uint16_t x)                         { return _mm512_set1_epi16((short) x); }
static inline void      turbo_u16_store(uint16_t * p, turbo_u16 x)         { _mm512_storeu_si512(p, x); }
static inline turbo_u16 turbo_u16_min(turbo_u16 a, turbo_u16 b)            { return _mm512_min_epu16(a, b); }
static inline turbo_u16 turbo_u16_sub(turbo_u16 a, turbo_u16 b)            { return _mm512_sub_epi16(a, b); }
static inline turbo_u16 turbo_u16_add_sat(turbo_u16 a, turbo_u16 b)        { return _mm512_adds_epu16(a, b); }

static inline turbo_u16 turbo_u16_step_cost(turbo_u16 target, turbo_u16 entry) {
    const __m512i d = _mm512_subs_epi16(target, entry);
    return _mm512_mulhrs_epi16(d, d);
}

static inline turbo_u16 turbo_u16_entries(const int8_t * p) {
    return _mm512_slli_epi16(_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *) p)), 8);
}

static inline turbo_u16 turbo_u16_fold(turbo_u16 x) { // both halves become the minimum of the two
    return _mm512_min_epu16(x, _mm512_shuffle_i64x2(x, x, _MM_SHUFFLE(1, 0, 3, 2)));
}

static inline uint16_t turbo_u16_smallest(turbo_u16 x) {
    const __m256i y = _mm256_min_epu16(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
    return (uint16_t) (turbo_u16x8_argmin(_mm_min_epu16(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1))) >> 16);
}

static const int16_t turbo_lane[32] = {
    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
};

static inline void turbo_u16_spread(int bits, const turbo_u16 * best, turbo_u16 * spread) {
    const __m512i lane = _mm512_loadu_si512(turbo_lane);
    for (int v = 0; v < 8; ++v) {
        if (bits == 4) { // states 16*lane + 2v (+1 in the upper half): low bits 2v (+1)
            const __m512i u = _mm512_add_epi16(_mm512_srli_epi16(lane, 4), _mm512_set1_epi16((short) (2*v)));
            spread[v] = _mm512_permutexvar_epi16(u, best[0]);
        } else if (bits == 3) { // states 8*lane + v: low bits 8*(lane % 4) + v
            const __m512i u = _mm512_slli_epi16(_mm512_and_si512(lane, _mm512_set1_epi16(3)), 3);
            spread[v] = _mm512_permutexvar_epi16(_mm512_add_epi16(u, _mm512_set1_epi16((short) v)), best[0]);
        } else { // states 4*(32*(v % 2) + lane) + v/2: low bits 4*(lane % 16) + v/2
            const __m512i u = _mm512_slli_epi16(_mm512_and_si512(lane, _mm512_set1_epi16(15)), 2);
            spread[v] = _mm512_permutex2var_epi16(best[0], _mm512_add_epi16(u, _mm512_set1_epi16((short) (v/2))), best[1]);
        }
    }
}

// ---- decoder ----

typedef __m512i turbo_i8x64;

// Values 8q .. 8q+7 have their states in the 5 bytes from 1 + kq, k bits apart: quadword q takes these bytes,
// then its 8 states.
static inline __m512i turbo_states(int bits, const uint8_t * block) {
    const __m512i bytes = _mm512_maskz_loadu_epi8(((__mmask64) 1 << TURBO_BLOCK_BYTES(bits)) - 1, block);
    const int64_t ramp = 0x0807060504030201, each = 0x0101010101010101*bits;
    const __m512i index = _mm512_set_epi64(ramp + 7*each, ramp + 6*each, ramp + 5*each, ramp + 4*each,
                                           ramp + 3*each, ramp + 2*each, ramp + 1*each, ramp);
    const __m512i shift = _mm512_set1_epi64(ramp*bits);
    return _mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(index, bytes));
}

static inline turbo_i8x64 turbo_entries(const turbo_codec * codec, int bits, const uint8_t * block) {
    const __m512i a = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) codec->a));
    const __m512i b = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) codec->b));
    const __m512i p = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) codec->p));
    const __m512i nibble = _mm512_set1_epi8(15);
    const __m512i w    = turbo_states(bits, block);
    const __m512i low  = _mm512_and_si512(w, nibble);
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(w, 4), nibble);
    const __m512i from_b = _mm512_shuffle_epi8(b, _mm512_xor_si512(high, _mm512_shuffle_epi8(p, low)));
    return _mm512_add_epi8(_mm512_shuffle_epi8(a, low), from_b);
}

static inline void turbo_store_scaled(turbo_i8x64 c, float scale, float * y) {
    const __m512 s = _mm512_set1_ps(scale);
    _mm512_storeu_ps(y +  0, _mm512_mul_ps(s, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_castsi512_si128(c)))));
    _mm512_storeu_ps(y + 16, _mm512_mul_ps(s, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(c, 1)))));
    _mm512_storeu_ps(y + 32, _mm512_mul_ps(s, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(c, 2)))));
    _mm512_storeu_ps(y + 48, _mm512_mul_ps(s, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(c, 3)))));
}

typedef __m512 turbo_sum;

static inline turbo_sum turbo_sum_zero(void)        { return _mm512_setzero_ps(); }
static inline float     turbo_sum_total(turbo_sum x) { return _mm512_reduce_add_ps(x); }

static inline turbo_sum turbo_sum_dot(turbo_sum sum, turbo_i8x64 c, const int8_t * q0, const int8_t * q1, float d0, float d1) {
    const __m512i q = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *) q0)),
                                         _mm256_loadu_si256((const __m256i *) q1), 1);
    // |c| times q with the sign of c: one factor must be unsigned
    const __m512i cq = _mm512_mask_sub_epi8(q, _mm512_movepi8_mask(c), _mm512_setzero_si512(), q);
    const __m512i ca = _mm512_abs_epi8(c);
#ifdef __AVX512VNNI__
    const __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), ca, cq);
#else
    const __m512i dot = _mm512_madd_epi16(_mm512_maddubs_epi16(ca, cq), _mm512_set1_epi16(1));
#endif
    const __m512 d = _mm512_insertf32x8(_mm512_set1_ps(d0), _mm256_set1_ps(d1), 1);
    return _mm512_fmadd_ps(d, _mm512_cvtepi32_ps(dot), sum);
}

// ---- attention ----

typedef __m512  turbo_f32;
typedef __m512i turbo_i32;

#define TURBO_F32_LANES   16
#define TURBO_SCORE_KEYS  2 // vectors of keys and of values that a step keeps in registers, for each of 4 queries
#define TURBO_VALUE_STEP  4
#ifdef __AVX512VNNI__
#define TURBO_KEY_BIAS    128 // the dot product wants one factor unsigned
#else
#define TURBO_KEY_BIAS    0
#endif

static inline turbo_f32 turbo_f32_load(const float * p)                          { return _mm512_loadu_ps(p); }
static inline void      turbo_f32_store(float * p, turbo_f32 x)                  { _mm512_storeu_ps(p, x); }
static inline turbo_f32 turbo_f32_set1(float x)                                  { return _mm512_set1_ps(x); }
static inline turbo_f32 turbo_f32_add(turbo_f32 a, turbo_f32 b)                  { return _mm512_add_ps(a, b); }
static inline turbo_f32 turbo_f32_mul(turbo_f32 a, turbo_f32 b)                  { return _mm512_mul_ps(a, b); }
static inline turbo_f32 turbo_f32_fma(turbo_f32 a, turbo_f32 b, turbo_f32 c)     { return _mm512_fmadd_ps(a, b, c); }
static inline turbo_f32 turbo_f32_max(turbo_f32 a, turbo_f32 b)                  { return _mm512_max_ps(a, b); }
static inline turbo_f32 turbo_f32_round(turbo_f32 x)                             { return _mm512_roundscale_ps(x, 0); }
static inline turbo_f32 turbo_f32_scale2(turbo_f32 x, turbo_f32 n)               { return _mm512_scalef_ps(x, n); }
static inline turbo_f32 turbo_f32_from_half(const uint16_t * p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)); }
static inline turbo_f32 turbo_f32_from_i32(turbo_i32 x)                          { return _mm512_cvtepi32_ps(x); }
static inline float     turbo_f32_total(turbo_f32 x)                             { return _mm512_reduce_add_ps(x); }
static inline float     turbo_f32_largest(turbo_f32 x)                           { return _mm512_reduce_max_ps(x); }

static inline turbo_f32 turbo_f32_zero_below(turbo_f32 y, turbo_f32 x, turbo_f32 limit) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), y);
}

static inline turbo_f32 turbo_f32_sub(turbo_f32 a, turbo_f32 b)                  { return _mm512_sub_ps(a, b); }

static inline turbo_f32 turbo_f32_butterfly(turbo_f32 x, int distance) {
    const __m512 partner = distance == 1 ? _mm512_permute_ps(x, 0xb1)
                         : distance == 2 ? _mm512_permute_ps(x, 0x4e)
                         : distance == 4 ? _mm512_shuffle_f32x4(x, x, 0xb1)
                         :                 _mm512_shuffle_f32x4(x, x, 0x4e);
    const __mmask16 upper = distance == 1 ? 0xaaaa : distance == 2 ? 0xcccc : distance == 4 ? 0xf0f0 : 0xff00;
    return _mm512_mask_sub_ps(_mm512_add_ps(x, partner), upper, partner, x);
}

static inline turbo_i32 turbo_i32_load(const void * p)  { return _mm512_loadu_si512(p); }
static inline turbo_i32 turbo_i32_set1(int32_t x)       { return _mm512_set1_epi32(x); }

static inline turbo_i32 turbo_i32_dot4(turbo_i32 sum, turbo_i32 keys, int32_t query) {
    const __m512i q = _mm512_set1_epi32(query);
#ifdef __AVX512VNNI__
    return _mm512_dpbusd_epi32(sum, keys, q);
#else
    const __m512i signed_q = _mm512_mask_sub_epi8(q, _mm512_movepi8_mask(keys), _mm512_setzero_si512(), q);
    const __m512i dot      = _mm512_maddubs_epi16(_mm512_abs_epi8(keys), signed_q);
    return _mm512_add_epi32(sum, _mm512_madd_epi16(dot, _mm512_set1_epi16(1)));
#endif
}

static inline void turbo_store_keys(turbo_i8x64 c, void * p) {
#ifdef __AVX512VNNI__
    c = _mm512_xor_si512(c, _mm512_set1_epi8((char) 0x80));
#endif
    _mm512_storeu_si512(p, c);
}

static inline void turbo_store_values(turbo_i8x64 c0, turbo_i8x64 c1, void * p) {
    const __m512i low = _mm512_set_epi8(95, 31, 94, 30, 93, 29, 92, 28, 91, 27, 90, 26, 89, 25, 88, 24, 87, 23, 86, 22, 85,
        21, 84, 20, 83, 19, 82, 18, 81, 17, 80, 16, 79, 15, 78, 14, 77, 13, 76, 12, 75, 11, 74, 10, 73, 9, 72, 8, 71, 7, 70,
        6, 69, 5, 68, 4, 67, 3, 66, 2, 65, 1, 64, 0);
    for (int half = 0; half < 2; ++half) {
        const __m512i pairs = _mm512_permutex2var_epi8(c0, _mm512_add_epi8(low, _mm512_set1_epi8((char) (32*half))), c1);
        __m512i * to = (__m512i *) p + 2*half;
        _mm512_storeu_si512(to + 0, _mm512_cvtepi8_epi16(_mm512_castsi512_si256(pairs)));
        _mm512_storeu_si512(to + 1, _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(pairs, 1)));
    }
}

static inline turbo_i32 turbo_i32_dot2(turbo_i32 sum, turbo_i32 values, int32_t weights) {
#ifdef __AVX512VNNI__
    return _mm512_dpwssd_epi32(sum, values, _mm512_set1_epi32(weights));
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(values, _mm512_set1_epi32(weights)));
#endif
}

static inline void turbo_f32_store_int16(int16_t * p, turbo_f32 x) {
    _mm256_storeu_si256((__m256i *) p, _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x)));
}

static inline void turbo_transpose(const int32_t * from, int64_t from_stride, int32_t * to, int64_t to_stride) {
    __m512i r[16], s[16];
    for (int i = 0; i < 16; ++i) {
        r[i] = _mm512_loadu_si512(from + i*from_stride);
    }
    for (int i = 0; i < 16; i += 2) {
        s[i]     = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) { // r[i + j]: column 4*lane + j of rows i .. i+3
        r[i]     = _mm512_unpacklo_epi64(s[i],     s[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(s[i],     s[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(s[i + 1], s[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(s[i + 1], s[i + 3]);
    }
    for (int j = 0; j < 4; ++j) {
        const __m512i low01  = _mm512_shuffle_i32x4(r[j],     r[4 + j],  0x88), high01 = _mm512_shuffle_i32x4(r[j],     r[4 + j],  0xdd);
        const __m512i low23  = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88), high23 = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
        _mm512_storeu_si512(to + (j +  0)*to_stride, _mm512_shuffle_i32x4(low01,  low23,  0x88));
        _mm512_storeu_si512(to + (j +  4)*to_stride, _mm512_shuffle_i32x4(high01, high23, 0x88));
        _mm512_storeu_si512(to + (j +  8)*to_stride, _mm512_shuffle_i32x4(low01,  low23,  0xdd));
        _mm512_storeu_si512(to + (j + 12)*to_stride, _mm512_shuffle_i32x4(high01, high23, 0xdd));
    }
}
