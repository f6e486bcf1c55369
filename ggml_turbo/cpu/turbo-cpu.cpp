// turbo types on the CPU: quantize, dequantize and dot product. This file has the structure; what differs between
// instruction sets are the small helpers of turbo-simd.h.

#include "turbo-cpu.h"
#include "turbo-encoder.h"
#include "turbo-simd.h"

#include <memory>

namespace {

// ggml's q8_0: 32 values, y = d * qs, d a half float.
struct turbo_q8_0 {
    uint16_t d;
    int8_t   qs[32];
};

float half_to_float(uint16_t h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
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

#ifdef TURBO_LANES

// ---- encoder ----

constexpr int VECTORS = TURBO_STATES/TURBO_LANES;

constexpr int best_vectors(int bits) { // of a row of turbo_paths
    return (1 << (8 - bits)) > TURBO_LANES ? (1 << (8 - bits))/TURBO_LANES : 1;
}

// What a codec's searches look up.
struct search_tables {
    // of a target + TURBO_MAX_TARGET and a state u << k | t, at [t << (8-k) | u]: states that can go on alike lie in the
    // same place of neighbouring vectors
    alignas(64) uint8_t step_cost[2*TURBO_MAX_TARGET + 1][TURBO_STATES];
    int16_t entry[TURBO_STATES]; // as a traceback subtracts them: 2 * factor * codebook

    explicit search_tables(const turbo_codec * codec) {
        const int bits = codec->bits;
        for (int state = 0; state < TURBO_STATES; ++state) {
            entry[state] = (int16_t) (2*turbo_cost_factor(bits)*codec->codebook[state]);
            const int place = (state & ((1 << bits) - 1)) << (8 - bits) | state >> bits;
            for (int target = -TURBO_MAX_TARGET; target <= TURBO_MAX_TARGET; ++target) {
                step_cost[target + TURBO_MAX_TARGET][place] = (uint8_t) turbo_step_cost(bits, target, codec->codebook[state]);
            }
        }
    }

    static const search_tables & of_type(int bits) {
        static const search_tables types[3] = {
            search_tables(turbo_get_codec(2)), search_tables(turbo_get_codec(3)), search_tables(turbo_get_codec(4)),
        };
        return types[bits - 2];
    }
};

// One value further: best, the costs by shared bits, and what renormalizing takes off them.
template <int BITS>
inline uint8_t step(const uint8_t * costs, bool renormalize, turbo_u8 * best) {
    constexpr int N_BEST = best_vectors(BITS);
    turbo_u8 cost[VECTORS];
    turbo_u8_spread(BITS, best, cost);
    for (int v = 0; v < VECTORS; ++v) {
        cost[v] = turbo_u8_add_sat(cost[v], turbo_u8_load(costs + v*TURBO_LANES));
    }
    for (int n = VECTORS/2; n >= N_BEST; n /= 2) { // halves onto halves: short chains
        for (int v = 0; v < n; ++v) {
            cost[v] = turbo_u8_min(cost[v], cost[v + n]);
        }
    }
    cost[0] = turbo_u8_fold(BITS, cost[0]);
    turbo_u8 removed = turbo_u8_set1(0);
    if (renormalize) {
        removed = cost[0];
        for (int v = 1; v < N_BEST; ++v) {
            removed = turbo_u8_min(removed, cost[v]);
        }
        removed = turbo_u8_smallest(removed);
    }
    for (int v = 0; v < N_BEST; ++v) {
        best[v] = renormalize ? turbo_u8_sub(cost[v], removed) : cost[v];
    }
    return turbo_u8_first(removed);
}

// As the reference's turbo_search.
template <int BITS>
void search(const turbo_codec *, const void * tables, turbo_candidate * candidates) {
    constexpr int N_BEST = best_vectors(BITS);
    const auto & step_cost = ((const search_tables *) tables)->step_cost;
    turbo_u8 best[2][N_BEST];
    for (int j = 0; j < 2; ++j) {
        candidates[j].cost = 0;
        for (int v = 0; v < N_BEST; ++v) {
            best[j][v] = turbo_u8_set1(0);
            turbo_u8_store(candidates[j].paths.best[0] + v*TURBO_LANES, best[j][v]);
        }
    }
    for (int i = 0; i < QK_TURBO; ++i) {
        const bool renormalize = (i + 1) % TURBO_RENORMALIZE == 0;
        for (int j = 0; j < 2; ++j) {
            const uint8_t * costs = step_cost[candidates[j].target[i] + TURBO_MAX_TARGET];
            candidates[j].cost += step<BITS>(costs, renormalize, best[j]);
            for (int v = 0; v < N_BEST; ++v) {
                turbo_u8_store(candidates[j].paths.best[i + 1] + v*TURBO_LANES, best[j][v]);
            }
        }
    }
}

// The cheapest of the states first .. end for value i.
template <int BITS>
inline uint8_t cheapest(const search_tables * tables, const turbo_candidate * candidate, int i, int first, int end) {
    const uint8_t * best   = candidate->paths.best[i];
    const int16_t   target = (int16_t) (turbo_cost_factor(BITS)*candidate->target[i]);
    uint32_t found = UINT32_MAX; // cost << 16 | state
    for (int s = first; s < end; s += BITS == 2 ? 4 : 8) {
        const turbo_u16x8 costs = turbo_u16x8_costs(target, tables->entry + s, best + s % (1 << (8 - BITS)));
        const uint32_t    c     = turbo_u16x8_argmin(BITS == 2 ? turbo_u16x8_first4(costs) : costs) + (uint32_t) s;
        found = c < found ? c : found;
    }
    return (uint8_t) found;
}

// As the reference's turbo_traceback.
template <int BITS>
void traceback(const turbo_codec *, const void * tables, int n, const turbo_candidate * const * candidates,
               uint8_t states[][QK_TURBO]) {
    const auto * t = (const search_tables *) tables;
    for (int j = 0; j < n; ++j) {
        states[j][QK_TURBO - 1] = cheapest<BITS>(t, candidates[j], QK_TURBO - 1, 0, TURBO_STATES);
    }
    for (int i = QK_TURBO - 2; i >= 0; --i) {
        for (int j = 0; j < n; ++j) {
            const int first = (states[j][i + 1] << BITS) % TURBO_STATES;
            states[j][i] = cheapest<BITS>(t, candidates[j], i, first, first + (1 << BITS));
        }
    }
}

void encode(const turbo_codec * codec, const float * x, uint8_t * blocks, int64_t n_blocks) {
    std::unique_ptr<const search_tables> of_training;
    const search_tables * tables;
    if (codec == turbo_get_codec(codec->bits)) {
        tables = &search_tables::of_type(codec->bits);
    } else {
        of_training.reset(new search_tables(codec));
        tables = of_training.get();
    }
    const turbo_search_t    searches[]   = { search<2>,    search<3>,    search<4>    };
    const turbo_traceback_t tracebacks[] = { traceback<2>, traceback<3>, traceback<4> };
    for (int64_t i = 0; i < n_blocks; i += 2) {
        const int n = n_blocks - i < 2 ? 1 : 2;
        turbo_encode_blocks(codec, tables, n, x + i*QK_TURBO, blocks + i*TURBO_BLOCK_BYTES(codec->bits),
                            searches[codec->bits - 2], tracebacks[codec->bits - 2]);
    }
}

// ---- decoder ----

template <int BITS>
void dequantize_row(const uint8_t * blocks, float * y, int64_t n) {
    const turbo_codec * codec = turbo_get_codec(BITS);
    for (int64_t i = 0; i < n/QK_TURBO; ++i) {
        const uint8_t * block = blocks + i*TURBO_BLOCK_BYTES(BITS);
        turbo_store_scaled(turbo_entries(codec, BITS, block), turbo_stored_scale(BITS, block), y + i*QK_TURBO);
    }
}

template <int BITS>
float vec_dot(int n, const uint8_t * blocks, const turbo_q8_0 * y) {
    const turbo_codec * codec = turbo_get_codec(BITS);
    turbo_sum sum = turbo_sum_zero();
    for (int i = 0; i < n/QK_TURBO; ++i) {
        const uint8_t * block = blocks + i*TURBO_BLOCK_BYTES(BITS);
        const float     scale = turbo_stored_scale(BITS, block);
        sum = turbo_sum_dot(sum, turbo_entries(codec, BITS, block), y[2*i].qs, y[2*i + 1].qs,
                            scale*half_to_float(y[2*i].d), scale*half_to_float(y[2*i + 1].d));
    }
    return turbo_sum_total(sum);
}

#else // no SIMD

void encode(const turbo_codec * codec, const float * x, uint8_t * blocks, int64_t n_blocks) {
    for (int64_t i = 0; i < n_blocks; ++i) {
        turbo_quantize_block(codec, x + i*QK_TURBO, blocks + i*TURBO_BLOCK_BYTES(codec->bits));
    }
}

template <int BITS>
void dequantize_row(const uint8_t * blocks, float * y, int64_t n) {
    for (int64_t i = 0; i < n/QK_TURBO; ++i) {
        turbo_dequantize_block(turbo_get_codec(BITS), blocks + i*TURBO_BLOCK_BYTES(BITS), y + i*QK_TURBO);
    }
}

template <int BITS>
float vec_dot(int n, const uint8_t * blocks, const turbo_q8_0 * y) {
    float sum = 0.0f, x[QK_TURBO];
    for (int i = 0; i < n/QK_TURBO; ++i) {
        turbo_dequantize_block(turbo_get_codec(BITS), blocks + i*TURBO_BLOCK_BYTES(BITS), x);
        for (int j = 0; j < QK_TURBO; ++j) {
            const turbo_q8_0 * q = &y[2*i + j/32];
            sum += x[j]*(half_to_float(q->d)*q->qs[j % 32]);
        }
    }
    return sum;
}

#endif

}  // namespace

const char * turbo_cpu_simd(void) {
    return TURBO_SIMD;
}

void turbo_quantize_blocks_cpu(const turbo_codec * codec, const float * x, uint8_t * blocks, int64_t n_blocks) {
    encode(codec, x, blocks, n_blocks);
}

#define TURBO_ROWS_CPU(K)                                                                                               \
    void quantize_row_turbo##K(const float * x, void * y, int64_t n) {                                                  \
        encode(turbo_get_codec(K), x, (uint8_t *) y, n/QK_TURBO);                                                       \
    }                                                                                                                   \
    void dequantize_row_turbo##K##_cpu(const void * x, float * y, int64_t n) {                                          \
        dequantize_row<K>((const uint8_t *) x, y, n);                                                                   \
    }                                                                                                                   \
    void ggml_vec_dot_turbo##K##_q8_0(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy,         \
                                      size_t by, int nrc) {                                                             \
        (void) bs, (void) bx, (void) by, (void) nrc; /* strides of the nrc > 1 form, which no turbo type announces */   \
        *s = vec_dot<K>(n, (const uint8_t *) vx, (const turbo_q8_0 *) vy);                                              \
    }

TURBO_ROWS_CPU(2)
TURBO_ROWS_CPU(3)
TURBO_ROWS_CPU(4)
