#pragma once

// What both x86 versions share: 8 lanes of 16 bits (SSE 4.1), to trace the best path back.

#include <immintrin.h>

static inline void turbo_prefetch(const void * p) {
    _mm_prefetch((const char *) p, _MM_HINT_T0);
}

typedef __m128i turbo_u16x8;

static inline turbo_u16x8 turbo_u16x8_costs(int16_t target, const int16_t * entries, const uint8_t * best) {
    const __m128i d = _mm_sub_epi16(_mm_set1_epi16(target), _mm_loadu_si128((const __m128i *) entries));
    const __m128i b = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *) best));
    return _mm_min_epu16(_mm_add_epi16(b, _mm_mulhrs_epi16(d, d)), _mm_set1_epi16(255));
}

static inline turbo_u16x8 turbo_u16x8_first4(turbo_u16x8 x) { // the other lanes become the largest
    return _mm_or_si128(x, _mm_set_epi64x(-1, 0));
}

static inline uint32_t turbo_u16x8_argmin(turbo_u16x8 x) {
    const uint32_t index_value = (uint32_t) _mm_cvtsi128_si32(_mm_minpos_epu16(x));
    return index_value << 16 | index_value >> 16;
}

// The smallest of 16 path costs, in the first lane.
static inline __m128i turbo_smallest_of_16(__m128i x) {
    return _mm_minpos_epu16(_mm_min_epu8(x, _mm_srli_epi16(x, 8))); // of pairs in the low bytes; the high ones become 0
}
