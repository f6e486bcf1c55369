#pragma once

// The SIMD helpers (turbo-simd.h says what each does) for AVX2 with FMA.

#include "turbo-simd-sse.h"
#include "turbo-states.h"

#define TURBO_SIMD  "avx2"
#define TURBO_LANES 16

// ---- trellis search ----

typedef __m256i turbo_u16;

static inline turbo_u16 turbo_u16_set1(uint16_t x)                  { return _mm256_set1_epi16((short) x); }
static inline void      turbo_u16_store(uint16_t * p, turbo_u16 x)  { _mm256_storeu_si256((__m256i *) p, x); }
static inline turbo_u16 turbo_u16_min(turbo_u16 a, turbo_u16 b)     { return _mm256_min_epu16(a, b); }
static inline turbo_u16 turbo_u16_sub(turbo_u16 a, turbo_u16 b)     { return _mm256_sub_epi16(a, b); }
static inline turbo_u16 turbo_u16_add_sat(turbo_u16 a, turbo_u16 b) { return _mm256_adds_epu16(a, b); }

static inline turbo_u16 turbo_u16_step_cost(turbo_u16 target, turbo_u16 entry) {
    const __m256i d = _mm256_subs_epi16(target, entry);
    return _mm256_mulhrs_epi16(d, d);
}

static inline turbo_u16 turbo_u16_entries(const int8_t * p) {
    return _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *) p)), 8);
}

static inline uint16_t turbo_u16_smallest(turbo_u16 x) {
    return (uint16_t) (turbo_u16x8_argmin(_mm_min_epu16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1))) >> 16);
}

static inline __m256i turbo_broadcast64(const uint16_t * p) {
    return _mm256_broadcastq_epi64(_mm_loadl_epi64((const __m128i *) p));
}

static inline void turbo_u16_spread(int bits, const turbo_u16 * best, turbo_u16 * spread) {
    if (bits == 4) { // states 16*lane + t: low bits t
        const __m256i half[2] = { _mm256_permute4x64_epi64(best[0], 0x44), _mm256_permute4x64_epi64(best[0], 0xee) };
        for (int t = 0; t < 16; ++t) {
            spread[t] = _mm256_shuffle_epi8(half[t/8], _mm256_set1_epi16((short) (0x0100 + 0x0202*(t % 8))));
        }
    } else if (bits == 3) { // states 8*lane + t: low bits 8*(lane % 4) + t; a transposition of 4 x 8
        uint16_t quads[32];
        const __m256i even = _mm256_unpacklo_epi16(best[0], _mm256_permute4x64_epi64(best[0], 0xee));
        const __m256i odd  = _mm256_unpacklo_epi16(best[1], _mm256_permute4x64_epi64(best[1], 0xee));
        const __m256i even_high = _mm256_unpackhi_epi16(best[0], _mm256_permute4x64_epi64(best[0], 0xee));
        const __m256i odd_high  = _mm256_unpackhi_epi16(best[1], _mm256_permute4x64_epi64(best[1], 0xee));
        const __m128i lo0 = _mm256_castsi256_si128(even),      lo1 = _mm256_castsi256_si128(odd);
        const __m128i hi0 = _mm256_castsi256_si128(even_high), hi1 = _mm256_castsi256_si128(odd_high);
        _mm_storeu_si128((__m128i *) (quads +  0), _mm_unpacklo_epi32(lo0, lo1));
        _mm_storeu_si128((__m128i *) (quads +  8), _mm_unpackhi_epi32(lo0, lo1));
        _mm_storeu_si128((__m128i *) (quads + 16), _mm_unpacklo_epi32(hi0, hi1));
        _mm_storeu_si128((__m128i *) (quads + 24), _mm_unpackhi_epi32(hi0, hi1));
        for (int t = 0; t < 8; ++t) {
            spread[2*t] = spread[2*t + 1] = turbo_broadcast64(quads + 4*t);
        }
    } else { // states 4*(16*j + lane) + t: low bits 4*lane + t; a transposition of 16 x 4
        const __m256i pairs = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        const __m256i r0 = _mm256_shuffle_epi8(best[0], pairs), r1 = _mm256_shuffle_epi8(best[1], pairs);
        const __m256i r2 = _mm256_shuffle_epi8(best[2], pairs), r3 = _mm256_shuffle_epi8(best[3], pairs);
        const __m256i lo01 = _mm256_unpacklo_epi32(r0, r1), hi01 = _mm256_unpackhi_epi32(r0, r1);
        const __m256i lo23 = _mm256_unpacklo_epi32(r2, r3), hi23 = _mm256_unpackhi_epi32(r2, r3);
        const __m256i by_t[4] = {
            _mm256_permutevar8x32_epi32(_mm256_unpacklo_epi64(lo01, lo23), order),
            _mm256_permutevar8x32_epi32(_mm256_unpackhi_epi64(lo01, lo23), order),
            _mm256_permutevar8x32_epi32(_mm256_unpacklo_epi64(hi01, hi23), order),
            _mm256_permutevar8x32_epi32(_mm256_unpackhi_epi64(hi01, hi23), order),
        };
        for (int v = 0; v < 16; ++v) {
            spread[v] = by_t[v/4];
        }
    }
}

// ---- decoder ----

TURBO_ASSERT(2*TURBO_MAX_ENTRY*127 <= INT16_MAX, "a sum of two products of an entry and a byte does not saturate");

typedef struct { __m256i half[2]; } turbo_i8x64;

static inline __m256i turbo_load_pair(const void * low, const void * high) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *) low)),
                                   _mm_loadu_si128((const __m128i *) high), 1);
}

static inline __m256i turbo_broadcast128(const void * p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) p));
}

// States of the values 32*half .. 32*half + 31.
static inline __m256i turbo_states(int bits, int half, const uint8_t * block) {
    const int g = 2*half;
    const __m256i bytes = turbo_load_pair(block + TURBO_STATE_LOAD(bits, g), block + TURBO_STATE_LOAD(bits, g + 1));
    __m256i parity[2];
    for (int odd = 0; odd < 2; ++odd) {
        const __m256i gather = _mm256_loadu_si256((const __m256i *) turbo_state_bytes[bits - TURBO_FEWEST_BITS][odd][g]);
        const __m256i factor = turbo_broadcast128(turbo_state_factors[bits - TURBO_FEWEST_BITS][odd]);
        parity[odd] = _mm256_mullo_epi16(_mm256_shuffle_epi8(bytes, gather), factor);
    }
    return _mm256_or_si256(_mm256_srli_epi16(parity[0], 8), _mm256_and_si256(parity[1], _mm256_set1_epi16((short) 0xff00)));
}

// Entries of 32 states, given by the low and the high halves of their bits.
static inline __m256i turbo_entries_of(const turbo_codec * codec, __m256i low, __m256i high) {
    const __m256i a = turbo_broadcast128(codec->a), b = turbo_broadcast128(codec->b), p = turbo_broadcast128(codec->p);
    const __m256i from_b = _mm256_shuffle_epi8(b, _mm256_xor_si256(high, _mm256_shuffle_epi8(p, low)));
    return _mm256_add_epi8(_mm256_shuffle_epi8(a, low), from_b);
}

static inline turbo_i8x64 turbo_entries(const turbo_codec * codec, int bits, const uint8_t * block) {
    const __m256i nibble = _mm256_set1_epi8(15);
    turbo_i8x64 c;
    if (bits == 4) { // a state is two neighbouring nibbles: of one byte for odd values, across two for even ones
        // in quarters 0, 2, 1, 3, which interleaving puts in order
        const __m256i bytes  = _mm256_permute4x64_epi64(_mm256_loadu_si256((const __m256i *) (block + 2)), 0xd8);
        const __m256i before = _mm256_permute4x64_epi64(_mm256_loadu_si256((const __m256i *) (block + 1)), 0xd8);
        const __m256i low    = _mm256_and_si256(bytes, nibble);
        const __m256i high   = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
        const __m256i even   = turbo_entries_of(codec, _mm256_and_si256(_mm256_srli_epi16(before, 4), nibble), low);
        const __m256i odd    = turbo_entries_of(codec, low, high);
        c.half[0] = _mm256_unpacklo_epi8(even, odd);
        c.half[1] = _mm256_unpackhi_epi8(even, odd);
        return c;
    }
    for (int half = 0; half < 2; ++half) {
        const __m256i w = turbo_states(bits, half, block);
        c.half[half] = turbo_entries_of(codec, _mm256_and_si256(w, nibble), _mm256_and_si256(_mm256_srli_epi16(w, 4), nibble));
    }
    return c;
}

static inline void turbo_store_scaled(turbo_i8x64 c, float scale, float * y) {
    int8_t entry[QK_TURBO];
    _mm256_storeu_si256((__m256i *) entry, c.half[0]);
    _mm256_storeu_si256((__m256i *) (entry + 32), c.half[1]);
    for (int i = 0; i < QK_TURBO; i += 8) {
        const __m256i x = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) (entry + i)));
        _mm256_storeu_ps(y + i, _mm256_mul_ps(_mm256_set1_ps(scale), _mm256_cvtepi32_ps(x)));
    }
}

typedef __m256 turbo_sum;

static inline turbo_sum turbo_sum_zero(void) { return _mm256_setzero_ps(); }

static inline float turbo_sum_total(turbo_sum x) {
    const __m128 r = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 s = _mm_add_ps(r, _mm_movehl_ps(r, r));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

static inline turbo_sum turbo_sum_dot(turbo_sum sum, turbo_i8x64 c, const int8_t * q0, const int8_t * q1, float d0, float d1) {
    const int8_t * q[2] = { q0, q1 };
    const float    d[2] = { d0, d1 };
    for (int half = 0; half < 2; ++half) {
        // |c| times q with the sign of c: one factor must be unsigned; sums of pairs fit in 16 bits
        const __m256i cq  = _mm256_sign_epi8(_mm256_loadu_si256((const __m256i *) q[half]), c.half[half]);
        const __m256i dot = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(c.half[half]), cq), _mm256_set1_epi16(1));
        sum = _mm256_fmadd_ps(_mm256_set1_ps(d[half]), _mm256_cvtepi32_ps(dot), sum);
    }
    return sum;
}

// ---- attention ----

typedef __m256  turbo_f32;
typedef __m256i turbo_i32;

#define TURBO_F32_LANES   8
#define TURBO_SCORE_KEYS  2 // vectors of keys and of values that a step keeps in registers, for each of 4 queries
#define TURBO_VALUE_STEP  2
#ifdef __AVXVNNI__
#define TURBO_KEY_BIAS    128 // the dot product wants one factor unsigned
#else
#define TURBO_KEY_BIAS    0
#endif

static inline turbo_f32 turbo_f32_load(const float * p)                          { return _mm256_loadu_ps(p); }
static inline void      turbo_f32_store(float * p, turbo_f32 x)                  { _mm256_storeu_ps(p, x); }
static inline turbo_f32 turbo_f32_set1(float x)                                  { return _mm256_set1_ps(x); }
static inline turbo_f32 turbo_f32_add(turbo_f32 a, turbo_f32 b)                  { return _mm256_add_ps(a, b); }
static inline turbo_f32 turbo_f32_mul(turbo_f32 a, turbo_f32 b)                  { return _mm256_mul_ps(a, b); }
static inline turbo_f32 turbo_f32_fma(turbo_f32 a, turbo_f32 b, turbo_f32 c)     { return _mm256_fmadd_ps(a, b, c); }
static inline turbo_f32 turbo_f32_max(turbo_f32 a, turbo_f32 b)                  { return _mm256_max_ps(a, b); }
static inline turbo_f32 turbo_f32_round(turbo_f32 x)                             { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline turbo_f32 turbo_f32_from_half(const uint16_t * p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p)); }
static inline turbo_f32 turbo_f32_from_i32(turbo_i32 x)                          { return _mm256_cvtepi32_ps(x); }
static inline float     turbo_f32_total(turbo_f32 x)                             { return turbo_sum_total(x); }

static inline turbo_f32 turbo_f32_scale2(turbo_f32 x, turbo_f32 n) { // n of at least -126
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
}

static inline float turbo_f32_largest(turbo_f32 x) {
    const __m128 r = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 s = _mm_max_ps(r, _mm_movehl_ps(r, r));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

static inline turbo_f32 turbo_f32_zero_below(turbo_f32 y, turbo_f32 x, turbo_f32 limit) {
    return _mm256_and_ps(y, _mm256_cmp_ps(x, limit, _CMP_NLT_UQ));
}

static inline turbo_f32 turbo_f32_sub(turbo_f32 a, turbo_f32 b)                  { return _mm256_sub_ps(a, b); }

static inline turbo_f32 turbo_f32_butterfly(turbo_f32 x, int distance) {
    if (distance == 1) {
        const __m256 partner = _mm256_permute_ps(x, 0xb1);
        return _mm256_blend_ps(_mm256_add_ps(x, partner), _mm256_sub_ps(partner, x), 0xaa);
    }
    if (distance == 2) {
        const __m256 partner = _mm256_permute_ps(x, 0x4e);
        return _mm256_blend_ps(_mm256_add_ps(x, partner), _mm256_sub_ps(partner, x), 0xcc);
    }
    const __m256 partner = _mm256_permute2f128_ps(x, x, 0x01);
    return _mm256_blend_ps(_mm256_add_ps(x, partner), _mm256_sub_ps(partner, x), 0xf0);
}

static inline turbo_i32 turbo_i32_load(const void * p)  { return _mm256_loadu_si256((const __m256i *) p); }
static inline turbo_i32 turbo_i32_set1(int32_t x)       { return _mm256_set1_epi32(x); }

static inline turbo_i32 turbo_i32_dot4(turbo_i32 sum, turbo_i32 keys, int32_t query) {
    const __m256i q = _mm256_set1_epi32(query);
#ifdef __AVXVNNI__
    return _mm256_dpbusd_avx_epi32(sum, keys, q);
#else
    const __m256i dot = _mm256_maddubs_epi16(_mm256_abs_epi8(keys), _mm256_sign_epi8(q, keys));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(dot, _mm256_set1_epi16(1)));
#endif
}

static inline void turbo_store_keys(turbo_i8x64 c, void * p) {
    for (int half = 0; half < 2; ++half) {
#ifdef __AVXVNNI__
        c.half[half] = _mm256_xor_si256(c.half[half], _mm256_set1_epi8((char) 0x80));
#endif
        _mm256_storeu_si256((__m256i *) p + half, c.half[half]);
    }
}

static inline void turbo_store_values(turbo_i8x64 c0, turbo_i8x64 c1, void * p) {
    for (int half = 0; half < 2; ++half) {
        const __m256i low  = _mm256_unpacklo_epi8(c0.half[half], c1.half[half]);
        const __m256i high = _mm256_unpackhi_epi8(c0.half[half], c1.half[half]);
        __m256i * to = (__m256i *) p + 4*half;
        _mm256_storeu_si256(to + 0, _mm256_cvtepi8_epi16(_mm256_castsi256_si128(low)));
        _mm256_storeu_si256(to + 1, _mm256_cvtepi8_epi16(_mm256_castsi256_si128(high)));
        _mm256_storeu_si256(to + 2, _mm256_cvtepi8_epi16(_mm256_extracti128_si256(low, 1)));
        _mm256_storeu_si256(to + 3, _mm256_cvtepi8_epi16(_mm256_extracti128_si256(high, 1)));
    }
}

static inline turbo_i32 turbo_i32_dot2(turbo_i32 sum, turbo_i32 values, int32_t weights) {
#ifdef __AVXVNNI__
    return _mm256_dpwssd_avx_epi32(sum, values, _mm256_set1_epi32(weights));
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(values, _mm256_set1_epi32(weights)));
#endif
}

static inline void turbo_f32_store_int16(int16_t * p, turbo_f32 x) {
    const __m256i i = _mm256_cvtps_epi32(x);
    _mm_storeu_si128((__m128i *) p, _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1)));
}

static inline void turbo_transpose(const int32_t * from, int64_t from_stride, int32_t * to, int64_t to_stride) {
    __m256i r[8], s[8];
    for (int i = 0; i < 8; ++i) {
        r[i] = _mm256_loadu_si256((const __m256i *) (from + i*from_stride));
    }
    for (int i = 0; i < 8; i += 2) {
        s[i]     = _mm256_unpacklo_epi32(r[i], r[i + 1]);
        s[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) { // r[i + j]: column 4*lane + j of rows i .. i+3
        r[i]     = _mm256_unpacklo_epi64(s[i],     s[i + 2]);
        r[i + 1] = _mm256_unpackhi_epi64(s[i],     s[i + 2]);
        r[i + 2] = _mm256_unpacklo_epi64(s[i + 1], s[i + 3]);
        r[i + 3] = _mm256_unpackhi_epi64(s[i + 1], s[i + 3]);
    }
    for (int j = 0; j < 4; ++j) {
        _mm256_storeu_si256((__m256i *) (to + (j + 0)*to_stride), _mm256_permute2x128_si256(r[j], r[4 + j], 0x20));
        _mm256_storeu_si256((__m256i *) (to + (j + 4)*to_stride), _mm256_permute2x128_si256(r[j], r[4 + j], 0x31));
    }
}
