// AVX-512 and AVX-VNNI for processors that have none, so that tests can run the code for it everywhere: SIMDe (Debian: libsimde-dev)
// in place of the compiler's header, and what SIMDe lacks, as Intel's Intrinsics Guide defines it.

#pragma once

#define SIMDE_NO_NATIVE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>

#define _mm256_dpbusd_avx_epi32 simde_mm256_dpbusd_epi32
#define _mm256_dpwssd_avx_epi32 simde_mm256_dpwssd_epi32
#define _MM_FROUND_NO_EXC SIMDE_MM_FROUND_NO_EXC
#undef  _mm512_madd_epi16 // 0.7.4 has it with the operands of the masked one
#define _mm512_madd_epi16 simde_mm512_madd_epi16

typedef simde__mmask16 __mmask16;
typedef simde__mmask64 __mmask64;

#include <math.h>
#include <string.h>

// the elements of a vector x of that type
#define EMULATED_LOAD(type, elements, x)  type elements[sizeof(x)/sizeof(type)]; memcpy(elements, &(x), sizeof(x))
#define EMULATED_EACH(i, n)               for (int i = 0; i < (n); ++i)

static inline __m512 emulated_ps(const float * x) {
    return simde_mm512_loadu_ps(x);
}

static inline float _cvtsh_ss(uint16_t half) {
    return simde_mm_cvtss_f32(simde_mm_cvtph_ps(simde_mm_set1_epi16((short) half)));
}

static inline __m512 _mm512_cvtepi32_ps(__m512i x) {
    EMULATED_LOAD(int32_t, from, x);
    float to[16];
    EMULATED_EACH(i, 16) { to[i] = (float) from[i]; }
    return emulated_ps(to);
}

static inline __m512i _mm512_cvtepi8_epi32(__m128i x) {
    EMULATED_LOAD(int8_t, from, x);
    int32_t to[16];
    EMULATED_EACH(i, 16) { to[i] = from[i]; }
    return simde_mm512_loadu_si512(to);
}

static inline __m512i _mm512_cvtps_epi32(__m512 x) {
    EMULATED_LOAD(float, from, x);
    int32_t to[16];
    EMULATED_EACH(i, 16) { to[i] = (int32_t) rintf(from[i]); }
    return simde_mm512_loadu_si512(to);
}

static inline __m512 _mm512_cvtph_ps(__m256i x) {
    EMULATED_LOAD(__m128i, half, x);
    float to[16];
    EMULATED_EACH(i, 4) { simde_mm_storeu_ps(to + 4*i, simde_mm_cvtph_ps(i % 2 ? simde_mm_srli_si128(half[i/2], 8) : half[i/2])); }
    return emulated_ps(to);
}

static inline __m512i _mm512_maskz_loadu_epi8(__mmask64 mask, const void * p) {
    int8_t to[64] = { 0 };
    EMULATED_EACH(i, 64) {
        if (mask >> i & 1) {
            to[i] = ((const int8_t *) p)[i];
        }
    }
    return simde_mm512_loadu_si512(to);
}

// Four elements of the same four, or four quarters of the same vector, chosen by 2 bits each.
static inline __m512 _mm512_permute_ps(__m512 x, int order) {
    EMULATED_LOAD(float, from, x);
    float to[16];
    EMULATED_EACH(i, 16) { to[i] = from[i/4*4 + (order >> 2*(i % 4) & 3)]; }
    return emulated_ps(to);
}

static inline __m512 _mm512_shuffle_f32x4(__m512 x, __m512 y, int order) {
    EMULATED_LOAD(float, low, x);
    EMULATED_LOAD(float, high, y);
    float to[16];
    EMULATED_EACH(i, 16) { to[i] = (i < 8 ? low : high)[4*(order >> 2*(i/4) & 3) + i % 4]; }
    return emulated_ps(to);
}

static inline __m512i _mm512_shuffle_i64x2(__m512i x, __m512i y, int order) {
    return simde_mm512_castps_si512(_mm512_shuffle_f32x4(simde_mm512_castsi512_ps(x), simde_mm512_castsi512_ps(y), order));
}

static inline float _mm512_reduce_add_ps(__m512 x) { // halves onto halves
    EMULATED_LOAD(float, sum, x);
    for (int half = 8; half > 0; half /= 2) {
        EMULATED_EACH(i, half) { sum[i] += sum[i + half]; }
    }
    return sum[0];
}

static inline float _mm512_reduce_max_ps(__m512 x) {
    EMULATED_LOAD(float, from, x);
    float largest = from[0];
    EMULATED_EACH(i, 16) { largest = from[i] > largest ? from[i] : largest; }
    return largest;
}
