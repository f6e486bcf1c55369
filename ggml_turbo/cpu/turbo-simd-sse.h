#pragma once

// What both x86 versions share: 8 lanes of 16 bits (SSE 4.1), to trace the best path back.

#include <immintrin.h>

static inline void turbo_prefetch(const void * p) {
    _mm_prefetch((const char *) p, _MM_HINT_T0);
}

typedef __m128i turbo_u16x8;

static inline turbo_u16x8 turbo_u16x8_costs(int16_t target, const int8_t * entries, const uint16_t * best) {
    const __m128i entry = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *) entries)), 8);
    const __m128i d     = _mm_subs_epi16(_mm_set1_epi16(target), entry);
    return _mm_adds_epu16(_mm_loadu_si128((const __m128i *) best), _mm_mulhrs_epi16(d, d));
}

static inline turbo_u16x8 turbo_u16x8_first4(turbo_u16x8 x) { // the other lanes become the largest
    return _mm_or_si128(x, _mm_set_epi64x(-1, 0));
}

static inline uint32_t turbo_u16x8_argmin(turbo_u16x8 x) {
    const uint32_t index_value = (uint32_t) _mm_cvtsi128_si32(_mm_minpos_epu16(x));
    return index_value << 16 | index_value >> 16;
}
