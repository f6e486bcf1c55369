// The scalar reference of turbo2, turbo3 and turbo4, which defines them. The format is described in ggml-turbo.h;
// the encoder's steps before and after the search are in turbo-encoder.h.

#include "turbo-encoder.h"
#include "turbo-tables.h"

const turbo_codec * turbo_get_codec(int bits) {
    return bits >= 2 && bits <= 4 ? &turbo_codecs[bits - 2] : NULL;
}

float turbo_block_scale(int bits, const uint8_t * block) {
    return turbo_stored_scale(bits, block);
}

// ---- decoder ----

// 8 bits of a block, from bit position pos
static int turbo_window(const uint8_t * block, int pos) {
    const int byte = pos / 8, shift = pos % 8;
    return shift == 0 ? block[byte] : ((block[byte] >> shift) | (block[byte + 1] << (8 - shift))) & 0xff;
}

void turbo_dequantize_block(const turbo_codec * codec, const uint8_t * block, float * y) {
    const float scale = turbo_stored_scale(codec->bits, block);
    for (int i = 0; i < QK_TURBO; ++i) {
        y[i] = scale*codec->codebook[turbo_window(block, 8 + codec->bits*(i + 1))];
    }
}

// ---- trellis search (Viterbi) ----
//
// State s follows the states (s << k | t) mod 256, t < 2^k: all that share s's low 8-k bits as their high bits.

// Cost of a path that goes on with a codebook entry for a target, from the cost of the best path that can. The step
// costs twice the squared distance, in codebook units, rounded; the distance saturates at 128 units.
static inline uint16_t turbo_path_cost(uint16_t best, int16_t target, int8_t entry) {
    int32_t d = target - 256*entry;
    d = d > INT16_MAX ? INT16_MAX : d < INT16_MIN ? INT16_MIN : d;
    const int32_t cost = best + ((d*d + (1 << 14)) >> 15);
    return (uint16_t) (cost > UINT16_MAX ? UINT16_MAX : cost);
}

static void turbo_search_one(const turbo_codec * codec, turbo_candidate * candidate) {
    const int16_t * target = candidate->target;
    turbo_paths   * paths  = &candidate->paths;
    const int n_shared = 1 << (8 - codec->bits), n_codes = 1 << codec->bits;
    candidate->cost = 0;
    memset(paths->best[0], 0, sizeof(paths->best[0])); // every start is free
    for (int i = 0; i < QK_TURBO; ++i) {
        uint16_t cost[TURBO_STATES];
        for (int code = 0; code < n_codes; ++code) {
            for (int u = 0; u < n_shared; ++u) {
                const int s = code*n_shared + u;
                cost[s] = turbo_path_cost(paths->best[i][u], target[i], codec->codebook[s]);
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
    const int n_shared = 1 << (8 - codec->bits), n_codes = 1 << codec->bits;
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
            first = states[j][i] % n_shared * n_codes;
            end   = first + n_codes;
        }
    }
}

void turbo_quantize_block(const turbo_codec * codec, const float * x, uint8_t * block) {
    turbo_encode_blocks(codec, 1, x, block, turbo_search, turbo_traceback);
}

// ---- rows ----

#define TURBO_ROWS(K)                                                                                               \
    void quantize_row_turbo##K##_ref(const float * x, block_turbo##K * y, int64_t n) {                              \
        for (int64_t i = 0; i < n/QK_TURBO; ++i) {                                                                  \
            turbo_quantize_block(&turbo_codecs[K - 2], x + i*QK_TURBO, y[i].bytes);                                 \
        }                                                                                                           \
    }                                                                                                               \
    void dequantize_row_turbo##K(const block_turbo##K * x, float * y, int64_t n) {                                  \
        for (int64_t i = 0; i < n/QK_TURBO; ++i) {                                                                  \
            turbo_dequantize_block(&turbo_codecs[K - 2], x[i].bytes, y + i*QK_TURBO);                               \
        }                                                                                                           \
    }                                                                                                               \
    size_t quantize_turbo##K(const float * src, void * dst, int64_t nrows, int64_t n_per_row,                       \
                             const float * imatrix) {                                                               \
        (void) imatrix;                                                                                             \
        quantize_row_turbo##K##_ref(src, (block_turbo##K *) dst, nrows*n_per_row);                                  \
        return (size_t) (nrows*n_per_row/QK_TURBO)*sizeof(block_turbo##K);                                          \
    }

TURBO_ROWS(2)
TURBO_ROWS(3)
TURBO_ROWS(4)
