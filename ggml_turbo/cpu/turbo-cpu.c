// turbo types on the CPU: quantize, dequantize and dot product. This file has the structure; what differs between
// instruction sets are the small helpers of turbo-simd.h.

#include "turbo-cpu.h"
#include "turbo-encode.h"
#include "turbo-simd.h"

#if defined(__F16C__) || defined(TURBO_HAS_AVX2) // processors had it before AVX2
#  define TURBO_HAS_F16C
#  include <immintrin.h>
#endif

#if defined(_MSC_VER)
#  define TURBO_INLINE static __forceinline
#else
#  define TURBO_INLINE static inline __attribute__((always_inline))
#endif

// ggml's q8_0: 32 values, y = d * qs, d a half float.
typedef struct {
    uint16_t d;
    int8_t   qs[32];
} turbo_q8_0;

static inline float turbo_half_to_float(uint16_t h) {
#if defined(TURBO_HAS_F16C)
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h)));
#elif defined(__ARM_NEON) && defined(__aarch64__)
    __fp16 f;
    memcpy(&f, &h, sizeof(f));
    return (float) f;
#else
    const uint32_t exponent = (h >> 10) & 31, mantissa = h & 1023;
    const float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                          : exponent ==  0 ? ldexpf((float) mantissa, -24)
                                           : ldexpf((float) (mantissa + 1024), (int) exponent - 25);
    return h >> 15 ? -magnitude : magnitude;
#endif
}

const char * turbo_cpu_simd(void) {
    return TURBO_SIMD;
}

#ifdef TURBO_LANES

// ---- encoder ----

// Bits of the types that turbo_u16_spread knows, on every instruction set; the reference searches for any other.
#define TURBO_SEARCHED(X) X(2) X(3) X(4)

#define TURBO_VECTORS (TURBO_STATES/TURBO_LANES)
#define TURBO_BEST_VECTORS(bits) (TURBO_SHARED(bits) > TURBO_LANES ? TURBO_SHARED(bits)/TURBO_LANES : 1) // of a row

TURBO_ASSERT(TURBO_STATES % TURBO_LANES == 0, "states fill whole vectors");
TURBO_ASSERT(TURBO_MAX_SHARED % TURBO_LANES == 0, "rows of best are whole vectors in memory");
TURBO_ASSERT(sizeof(turbo_paths) >= sizeof(uint16_t)*((QK_TURBO + 1)*TURBO_MAX_SHARED + 8),
             "8 lanes may be read from any place in a row");

#define TURBO_ASSERT_SEARCH(K)                                                                                        \
    TURBO_ASSERT(TURBO_SHARED(K) % TURBO_LANES == 0 || TURBO_SHARED(K) == TURBO_LANES/2,                              \
                 "the costs by shared bits fill whole vectors, or half of one, which is then folded");                \
    TURBO_ASSERT(TURBO_CODES(K) == 4 || TURBO_CODES(K) % 8 == 0, "a traceback takes 8 states at a time, or 4");
TURBO_SEARCHED(TURBO_ASSERT_SEARCH)
#undef TURBO_ASSERT_SEARCH

// One value further: best, the costs by shared bits, and what renormalizing takes off them.
TURBO_INLINE uint16_t turbo_step(int bits, const turbo_u16 * entries, int16_t target, int renormalize, turbo_u16 * best) {
    const int n_best = TURBO_BEST_VECTORS(bits);
    const turbo_u16 x = turbo_u16_set1((uint16_t) target);
    turbo_u16 spread[TURBO_VECTORS];
    turbo_u16_spread(bits, best, spread);
    for (int v = 0; v < n_best; ++v) {
        best[v] = turbo_u16_set1(UINT16_MAX);
    }
    for (int v = 0; v < TURBO_VECTORS; ++v) {
        const turbo_u16 cost = turbo_u16_add_sat(spread[v], turbo_u16_step_cost(x, entries[v]));
        best[v % n_best] = turbo_u16_min(best[v % n_best], cost);
    }
#if TURBO_LANES > 16
    if (TURBO_SHARED(bits) < TURBO_LANES) {
        best[0] = turbo_u16_fold(best[0]);
    }
#endif
    if (!renormalize) {
        return 0;
    }
    turbo_u16 smallest = best[0];
    for (int v = 1; v < n_best; ++v) {
        smallest = turbo_u16_min(smallest, best[v]);
    }
    const uint16_t removed = turbo_u16_smallest(smallest);
    for (int v = 0; v < n_best; ++v) {
        best[v] = turbo_u16_sub(best[v], turbo_u16_set1(removed));
    }
    return removed;
}

// As the reference's turbo_search; bits is a constant where this is inlined.
TURBO_INLINE void turbo_search_bits(int bits, const turbo_codec * codec, turbo_candidate * candidates) {
    const int n_best = TURBO_BEST_VECTORS(bits);

    turbo_u16 entries[TURBO_VECTORS], best[2][TURBO_MAX_SHARED/TURBO_LANES];
    for (int v = 0; v < TURBO_VECTORS; ++v) {
        entries[v] = turbo_u16_entries(codec->by_low + v*TURBO_LANES);
    }
    for (int j = 0; j < 2; ++j) {
        candidates[j].cost = 0;
        for (int v = 0; v < n_best; ++v) {
            best[j][v] = turbo_u16_set1(0);
            turbo_u16_store(candidates[j].paths.best[0] + v*TURBO_LANES, best[j][v]);
        }
    }
    for (int i = 0; i < QK_TURBO; ++i) {
        const int renormalize = (i + 1) % TURBO_RENORMALIZE == 0;
        for (int j = 0; j < 2; ++j) {
            candidates[j].cost += turbo_step(bits, entries, candidates[j].target[i], renormalize, best[j]);
            for (int v = 0; v < n_best; ++v) {
                turbo_u16_store(candidates[j].paths.best[i + 1] + v*TURBO_LANES, best[j][v]);
            }
        }
    }
}

// The cheapest of the states first .. end for value i.
TURBO_INLINE uint8_t turbo_cheapest(int bits, const turbo_codec * codec, const turbo_candidate * candidate, int i,
                                    int first, int end) {
    const uint16_t * best = candidate->paths.best[i];
    uint32_t cheapest = UINT32_MAX; // cost << 16 | state
    for (int s = first; s < end; s += bits == 2 ? 4 : 8) {
        const uint16_t *  from  = best + s % TURBO_SHARED(bits);
        const turbo_u16x8 costs = turbo_u16x8_costs(candidate->target[i], codec->codebook + s, from);
        const uint32_t    c     = turbo_u16x8_argmin(bits == 2 ? turbo_u16x8_first4(costs) : costs) + (uint32_t) s;
        cheapest = c < cheapest ? c : cheapest;
    }
    return (uint8_t) cheapest;
}

TURBO_INLINE void turbo_traceback_bits(int bits, const turbo_codec * codec, int n,
                                       const turbo_candidate * const * candidates, uint8_t states[][QK_TURBO]) {
    for (int j = 0; j < n; ++j) {
        states[j][QK_TURBO - 1] = turbo_cheapest(bits, codec, candidates[j], QK_TURBO - 1, 0, TURBO_STATES);
    }
    for (int i = QK_TURBO - 2; i >= 0; --i) {
        for (int j = 0; j < n; ++j) {
            const int first = turbo_first_before(bits, states[j][i + 1]);
            states[j][i] = turbo_cheapest(bits, codec, candidates[j], i, first, first + TURBO_CODES(bits));
        }
    }
}

#define TURBO_SEARCH(K)                                                                                               \
    static void turbo_search_##K(const turbo_codec * codec, turbo_candidate * candidates) {                           \
        turbo_search_bits(K, codec, candidates);                                                                      \
    }                                                                                                                 \
    static void turbo_traceback_##K(const turbo_codec * codec, int n, const turbo_candidate * const * candidates,     \
                                    uint8_t states[][QK_TURBO]) {                                                     \
        turbo_traceback_bits(K, codec, n, candidates, states);                                                        \
    }

TURBO_SEARCHED(TURBO_SEARCH)

// ---- decoder ----

TURBO_INLINE void turbo_dequantize_row_bits(int bits, const uint8_t * blocks, float * y, int64_t n) {
    const turbo_codec * codec = turbo_get_codec(bits);
    for (int64_t i = 0; i < n/QK_TURBO; ++i) {
        const uint8_t * block = blocks + i*TURBO_BLOCK_BYTES(bits);
        turbo_store_scaled(turbo_entries(codec, bits, block), turbo_stored_scale(bits, block), y + i*QK_TURBO);
    }
}

TURBO_INLINE float turbo_vec_dot_bits(int bits, int n, const uint8_t * blocks, const turbo_q8_0 * y) {
    const turbo_codec * codec = turbo_get_codec(bits);
    turbo_sum sum = turbo_sum_zero();
    for (int i = 0; i < n/QK_TURBO; ++i) {
        const uint8_t * block = blocks + i*TURBO_BLOCK_BYTES(bits);
        const float     scale = turbo_stored_scale(bits, block);
        sum = turbo_sum_dot(sum, turbo_entries(codec, bits, block), y[2*i].qs, y[2*i + 1].qs,
                            scale*turbo_half_to_float(y[2*i].d), scale*turbo_half_to_float(y[2*i + 1].d));
    }
    return turbo_sum_total(sum);
}

#else // no SIMD

static void turbo_dequantize_row_bits(int bits, const uint8_t * blocks, float * y, int64_t n) {
    for (int64_t i = 0; i < n/QK_TURBO; ++i) {
        turbo_dequantize_block(turbo_get_codec(bits), blocks + i*TURBO_BLOCK_BYTES(bits), y + i*QK_TURBO);
    }
}

static float turbo_vec_dot_bits(int bits, int n, const uint8_t * blocks, const turbo_q8_0 * y) {
    float sum = 0.0f, x[QK_TURBO];
    for (int i = 0; i < n/QK_TURBO; ++i) {
        turbo_dequantize_block(turbo_get_codec(bits), blocks + i*TURBO_BLOCK_BYTES(bits), x);
        for (int j = 0; j < QK_TURBO; ++j) {
            const turbo_q8_0 * q = &y[2*i + j/32];
            sum += x[j]*(turbo_half_to_float(q->d)*q->qs[j % 32]);
        }
    }
    return sum;
}

#endif

// 1 or 2 blocks
static void turbo_encode_blocks_cpu(const turbo_codec * codec, int n, const float * x, uint8_t * blocks) {
#ifdef TURBO_LANES
#define TURBO_ENCODE(K) \
    case K: turbo_encode_blocks(codec, n, x, blocks, turbo_search_##K, turbo_traceback_##K); return;
    switch (codec->bits) {
        TURBO_SEARCHED(TURBO_ENCODE)
    }
#undef TURBO_ENCODE
#endif
    for (int i = 0; i < n; ++i) {
        turbo_quantize_block(codec, x + i*QK_TURBO, blocks + i*TURBO_BLOCK_BYTES(codec->bits));
    }
}

void turbo_quantize_blocks_cpu(const turbo_codec * codec, const float * x, uint8_t * blocks, int64_t n_blocks) {
    for (int64_t i = 0; i < n_blocks; i += 2) {
        const int n = n_blocks - i < 2 ? 1 : 2;
        turbo_encode_blocks_cpu(codec, n, x + i*QK_TURBO, blocks + i*TURBO_BLOCK_BYTES(codec->bits));
    }
}

#define TURBO_ROWS_CPU(K, ID)                                                                                         \
    void quantize_row_turbo##K(const float * x, void * y, int64_t n) {                                                \
        turbo_quantize_blocks_cpu(turbo_get_codec(K), x, (uint8_t *) y, n/QK_TURBO);                                  \
    }                                                                                                                 \
    void dequantize_row_turbo##K##_cpu(const void * x, float * y, int64_t n) {                                        \
        turbo_dequantize_row_bits(K, (const uint8_t *) x, y, n);                                                      \
    }                                                                                                                 \
    void ggml_vec_dot_turbo##K##_q8_0(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy,       \
                                      size_t by, int nrc) {                                                           \
        (void) bs, (void) bx, (void) by, (void) nrc; /* strides of the nrc > 1 form, which no turbo type announces */ \
        *s = turbo_vec_dot_bits(K, n, (const uint8_t *) vx, (const turbo_q8_0 *) vy);                                 \
    }

TURBO_TYPES(TURBO_ROWS_CPU)
