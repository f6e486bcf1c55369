// The scalar reference of turbo2, turbo3 and turbo4, which defines them. README.md describes the format, turbo-block.h
// has its arithmetic; the encoder's steps before and after the search are in turbo-encode.h.

#include "tables/turbo-tables.h"
#include "turbo-encode.h"

const turbo_codec * turbo_get_codec(int bits) {
    return bits >= TURBO_FEWEST_BITS && bits <= TURBO_MOST_BITS ? &turbo_codecs[bits - TURBO_FEWEST_BITS] : NULL;
}

float turbo_block_scale(int bits, const uint8_t * block) {
    return turbo_stored_scale(bits, block);
}

// ---- decoder ----

static int turbo_read_state(int bits, int i, const uint8_t * block) {
    const int byte = TURBO_STATE_BIT(bits, i)/8;
    const int next = byte + 1 < TURBO_BLOCK_BYTES(bits) ? block[byte + 1] : 0;
    return turbo_state(bits, i, (uint32_t) (block[byte] | next << 8));
}

void turbo_dequantize_block(const turbo_codec * codec, const uint8_t * block, float * y) {
    const float scale = turbo_stored_scale(codec->bits, block);
    for (int i = 0; i < QK_TURBO; ++i) {
        y[i] = turbo_value(scale, codec->codebook[turbo_read_state(codec->bits, i, block)]);
    }
}

// ---- trellis search (Viterbi) ----
//
// State s follows the states (s << k | t) mod 256, t < 2^k: all that share s's low 8-k bits as their high bits.

static void turbo_search_one(const turbo_codec * codec, turbo_candidate * candidate) {
    const int16_t * target = candidate->target;
    turbo_paths   * paths  = &candidate->paths;
    const int n_shared = TURBO_SHARED(codec->bits), n_codes = TURBO_CODES(codec->bits);
    candidate->cost = 0;
    memset(paths->best[0], 0, sizeof(paths->best[0])); // every start is free
    for (int i = 0; i < QK_TURBO; ++i) {
        uint16_t cost[TURBO_STATES];
        for (int code = 0; code < n_codes; ++code) {
            for (int u = 0; u < n_shared; ++u) {
                const int s = code*n_shared + u;
                cost[s] = (uint16_t) turbo_path_cost(paths->best[i][u], target[i], codec->codebook[s]);
            }
        }
        uint16_t * next = paths->best[i + 1];
        uint16_t smallest = UINT16_MAX;
        for (int u = 0; u < n_shared; ++u) {
            next[u] = UINT16_MAX;
            for (int s = u*n_codes; s < (u + 1)*n_codes; ++s) {
                next[u] = cost[s] < next[u] ? cost[s] : next[u];
            }
            smallest = next[u] < smallest ? next[u] : smallest;
        }
        if ((i + 1) % TURBO_RENORMALIZE == 0) {
            for (int u = 0; u < n_shared; ++u) {
                next[u] -= smallest;
            }
            candidate->cost += smallest;
        }
    }
}

static void turbo_search(const turbo_codec * codec, turbo_candidate * candidates) {
    turbo_search_one(codec, &candidates[0]);
    turbo_search_one(codec, &candidates[1]);
}

static void turbo_traceback(const turbo_codec * codec, int n, const turbo_candidate * const * candidates,
                            uint8_t states[][QK_TURBO]) {
    const int n_shared = TURBO_SHARED(codec->bits), n_codes = TURBO_CODES(codec->bits);
    for (int j = 0; j < n; ++j) {
        const int16_t * target = candidates[j]->target;
        int first = 0, end = TURBO_STATES; // what states[j][i] can be
        for (int i = QK_TURBO - 1; i >= 0; --i) {
            const uint16_t * best = candidates[j]->paths.best[i];
            int smallest = UINT16_MAX + 1;
            for (int s = first; s < end; ++s) {
                const int cost = turbo_path_cost(best[s % n_shared], target[i], codec->codebook[s]);
                if (cost < smallest) {
                    smallest     = cost;
                    states[j][i] = (uint8_t) s;
                }
            }
            first = turbo_first_before(codec->bits, states[j][i]);
            end   = first + n_codes;
        }
    }
}

void turbo_quantize_block(const turbo_codec * codec, const float * x, uint8_t * block) {
    turbo_encode_blocks(codec, 1, x, block, turbo_search, turbo_traceback);
}

// ---- rows ----

#define TURBO_ROWS(K, ID)                                                                                           \
    void quantize_row_turbo##K##_ref(const float * x, block_turbo##K * y, int64_t n) {                              \
        for (int64_t i = 0; i < n/QK_TURBO; ++i) {                                                                  \
            turbo_quantize_block(turbo_get_codec(K), x + i*QK_TURBO, y[i].bytes);                                   \
        }                                                                                                           \
    }                                                                                                               \
    void dequantize_row_turbo##K(const block_turbo##K * x, float * y, int64_t n) {                                  \
        for (int64_t i = 0; i < n/QK_TURBO; ++i) {                                                                  \
            turbo_dequantize_block(turbo_get_codec(K), x[i].bytes, y + i*QK_TURBO);                                 \
        }                                                                                                           \
    }                                                                                                               \
    size_t quantize_turbo##K(const float * src, void * dst, int64_t nrows, int64_t n_per_row,                       \
                             const float * imatrix) {                                                               \
        (void) imatrix;                                                                                             \
        quantize_row_turbo##K##_ref(src, (block_turbo##K *) dst, nrows*n_per_row);                                  \
        return (size_t) (nrows*n_per_row/QK_TURBO)*sizeof(block_turbo##K);                                          \
    }

TURBO_TYPES(TURBO_ROWS)
