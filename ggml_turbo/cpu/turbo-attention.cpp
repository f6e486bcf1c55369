// Flash attention on quantized keys and values.
//
// Grouping   A task is one KV head, up to 64 rows (a row: one query of one of the head's query heads) and a range of
//            keys. Keys and values are decoded once a task and 64 keys, and used by all its rows.
// Keys       turbo: int8 codebook entries, 4 bytes of 64 keys side by side, against int8 queries with a scale for 64
//            values; sums of 64 products are exact integers. Other types: float32, the same layout.
// Values     turbo: codebook entries as 16-bit integers, two keys side by side, against weights times the keys' scales,
//            rounded to 16 bits of the largest among 64 keys; sums over 64 keys are exact integers. Other types: float32.
// Softmax    online (Milakov and Gimelshein, arXiv 1805.02867), all in float32.
// Parts      With a recent window there are three sets of keys and values, each with its mask: the cache, the ring of the
//            window and the batch itself. Rows that see nothing of a tile of keys are left out of it.
// Splitting  Where there are few rows, the keys are split into ranges whose partial results are merged at the end.
//            The ranges depend on the shapes alone, so the result does not depend on the number of threads.
//
// Error against float32 arithmetic on the same decoded keys and values: that of the int8 queries, at most 1/254 of a
// query's largest value in 64, as in ggml's own dot products of quantized types; that of the 16-bit weights, at most
// 1/65534 of the largest among 64; the rest is rounding. docs/attention.md has the figures.

#include "turbo-ops.h"

#include "turbo-encode.h"
#include "turbo-simd.h"
#include "ops/turbo-window.h"

#ifdef TURBO_LANES

#include <algorithm>
#include <cmath>
#include <cstring>

namespace {

constexpr int ROWS  = 64; // rows of a task at most
constexpr int KEYS  = 64; // keys decoded at a time
constexpr int AHEAD = 16; // keys whose memory is asked for ahead of their decoding
constexpr int CHUNK = QK_TURBO; // values of a head that are decoded, scaled and summed together
constexpr int SPLIT_KEYS  = 256; // keys of a range at least
constexpr int SPLIT_TASKS = 128; // tasks wanted, where there are keys enough

constexpr int SCORE_STEP = TURBO_SCORE_KEYS*TURBO_F32_LANES; // keys that are scored at once
constexpr int VALUE_STEP = TURBO_VALUE_STEP*TURBO_F32_LANES; // values of a head that are summed at once

constexpr int MAX_INT8 = 127, MAX_INT16 = 32767; // of rounded queries and weights

static_assert(KEYS % SCORE_STEP == 0, "a tile of keys is scored in whole steps");
static_assert(KEYS % TURBO_F32_LANES == 0 && CHUNK % TURBO_F32_LANES == 0, "tiles are transposed and rounded in whole vectors");
static_assert(CHUNK % VALUE_STEP == 0, "values are summed in whole steps");
static_assert(CHUNK == QK_TURBO, "a chunk has one scale a key");
static_assert(CHUNK % 4 == 0, "keys are words of 4 bytes");
static_assert(KEYS % 2 == 0, "values are words of two keys");
static_assert(SPLIT_KEYS % KEYS == 0, "ranges of keys begin with a tile");
static_assert(CHUNK*MAX_INT8*(TURBO_MAX_ENTRY + TURBO_KEY_BIAS) <= INT32_MAX, "sums of query * key are exact");
static_assert(KEYS*TURBO_MAX_ENTRY <= INT32_MAX/MAX_INT16, "sums of weight * value are exact");

constexpr uint16_t HALF_MINUS_INFINITY = 0xfc00;

// ---- decoding ----

// Calls f with the bits of a turbo type as a constant, 0 for any other type.
template <typename F>
void by_bits(ggml_type type, F && f) {
#define TURBO_CALL(K, ID) case K: f(std::integral_constant<int, K>()); break;
    switch (turbo_bits(type)) {
        TURBO_TYPES(TURBO_CALL)
        default: f(std::integral_constant<int, 0>()); break;
    }
#undef TURBO_CALL
}

// Keys are scored SCORE_STEP at a time.
int scored(int keys) {
    return (keys + SCORE_STEP - 1)/SCORE_STEP*SCORE_STEP;
}

// 64 values of `keys` keys of a stock type, stride bytes apart, as floats [key][CHUNK]; zeros for keys that are not there
// and scored all the same: they are masked but must not be NaN.
void decode_f32(ggml_type type, const char * from, size_t stride, int keys, float * to) {
    const auto to_float = ggml_get_type_traits(type)->to_float;
    for (int key = 0; key < keys; ++key, from += stride, to += CHUNK) {
        if (type == GGML_TYPE_F16) {
            for (int i = 0; i < CHUNK; i += TURBO_F32_LANES) {
                turbo_f32_store(to + i, turbo_f32_from_half((const uint16_t *) from + i));
            }
        } else if (to_float) {
            to_float(from, to, CHUNK);
        } else {
            memcpy(to, from, CHUNK*sizeof(float));
        }
    }
    std::fill_n(to, (scored(keys) - keys)*CHUNK, 0.0f);
}

// Of a turbo type, as bytes [key][CHUNK], and their scales, which are 0 for the keys that are not there.
template <int BITS>
void decode_int8(const char * from, size_t stride, int keys, int8_t * to, float * scales) {
    const turbo_codec * codec = turbo_get_codec(BITS);
    for (int key = 0; key < keys; ++key, from += stride) {
        const uint8_t * block = (const uint8_t *) from;
        turbo_prefetch(from + AHEAD*stride);
        turbo_store_keys(turbo_entries(codec, BITS, block), to + key*CHUNK);
        scales[key] = turbo_stored_scale(BITS, block);
    }
    std::fill_n(scales + keys, KEYS - keys, 0.0f);
}

// The same as words of two keys' 16-bit entries, [key/2][CHUNK].
template <int BITS>
void decode_int16(const char * from, size_t stride, int keys, int32_t * to, float * scales) {
    const turbo_codec * codec = turbo_get_codec(BITS);
    for (int key = 0; key < keys; key += 2, from += 2*stride, to += CHUNK) {
        const uint8_t * block0 = (const uint8_t *) from, * block1 = key + 1 < keys ? block0 + stride : block0;
        turbo_prefetch(from + AHEAD*stride);
        turbo_prefetch(from + (AHEAD + 1)*stride);
        turbo_store_values(turbo_entries(codec, BITS, block0), turbo_entries(codec, BITS, block1), to);
        scales[key]     = turbo_stored_scale(BITS, block0);
        scales[key + 1] = turbo_stored_scale(BITS, block1);
    }
    std::fill_n(scales + keys, KEYS - keys, 0.0f);
}

void transpose_tile(const int32_t * rows, int columns, int keys, int32_t * to) { // KEYS x columns; only what scores of `keys` keys read
    for (int c = 0; c < columns; c += TURBO_F32_LANES) {
        for (int key = 0; key < scored(keys); key += TURBO_F32_LANES) {
            turbo_transpose(rows + key*columns + c, columns, to + c*KEYS + key, KEYS);
        }
    }
}

// ---- the products, for R rows at a time ----

// Vectors of R rows that stay in registers; in memory, rows are `stride` floats apart.
template <int R, int STEP>
struct register_tile {
    turbo_f32 x[R][STEP];

    void zero() {
        each([&](int r, int j) { x[r][j] = turbo_f32_set1(0.0f); });
    }

    void load(const float * from, int64_t stride) {
        each([&](int r, int j) { x[r][j] = turbo_f32_load(from + r*stride + j*TURBO_F32_LANES); });
    }

    void store(float * to, int64_t stride) const {
        each([&](int r, int j) { turbo_f32_store(to + r*stride + j*TURBO_F32_LANES, x[r][j]); });
    }

    template <typename F>
    static void each(F && f) {
        for (int r = 0; r < R; ++r) {
            for (int j = 0; j < STEP; ++j) {
                f(r, j);
            }
        }
    }
};

// scores[r][key] = sum over chunks of scale_q * scale_k * dot of int8; keys: [chunk][16][KEYS] words of 4 bytes
template <int R>
void score_int8(const int32_t * query, const float * query_scale, const int32_t * query_sum, const int32_t * keys,
                const float * key_scale, int chunks, int n_keys, float * scores) {
    constexpr int STEP = SCORE_STEP/TURBO_F32_LANES, WORDS = CHUNK/4;
    register_tile<R, STEP> sum;
    for (int key = 0; key < n_keys; key += SCORE_STEP) {
        sum.zero();
        for (int c = 0; c < chunks; ++c) {
            turbo_i32 dot[R][STEP];
            sum.each([&](int r, int j) { dot[r][j] = turbo_i32_set1(-TURBO_KEY_BIAS*query_sum[r*chunks + c]); });
            for (int w = c*WORDS; w < (c + 1)*WORDS; ++w) {
                for (int j = 0; j < STEP; ++j) {
                    const turbo_i32 k = turbo_i32_load(keys + w*KEYS + key + j*TURBO_F32_LANES);
                    for (int r = 0; r < R; ++r) {
                        dot[r][j] = turbo_i32_dot4(dot[r][j], k, query[r*chunks*WORDS + w]);
                    }
                }
            }
            sum.each([&](int r, int j) {
                const turbo_f32 scale_k = turbo_f32_load(key_scale + c*KEYS + key + j*TURBO_F32_LANES);
                const turbo_f32 scale   = turbo_f32_mul(scale_k, turbo_f32_set1(query_scale[r*chunks + c]));
                sum.x[r][j] = turbo_f32_fma(turbo_f32_from_i32(dot[r][j]), scale, sum.x[r][j]);
            });
        }
        sum.store(scores + key, KEYS);
    }
}

// The same with float32 queries and keys, [value][KEYS].
template <int R>
void score_f32(const float * query, const float * keys, int values, int n_keys, float * scores) {
    constexpr int STEP = SCORE_STEP/TURBO_F32_LANES;
    register_tile<R, STEP> sum;
    for (int key = 0; key < n_keys; key += SCORE_STEP) {
        sum.zero();
        for (int d = 0; d < values; ++d) {
            for (int j = 0; j < STEP; ++j) {
                const turbo_f32 k = turbo_f32_load(keys + d*KEYS + key + j*TURBO_F32_LANES);
                for (int r = 0; r < R; ++r) {
                    sum.x[r][j] = turbo_f32_fma(k, turbo_f32_set1(query[r*values + d]), sum.x[r][j]);
                }
            }
        }
        sum.store(scores + key, KEYS);
    }
}

// A row's KEYS weights times the scales of the values, in units of the number that is returned.
float round_weights(const float * weights, const float * scales, int16_t * rounded) {
    turbo_f32 largest = turbo_f32_set1(0.0f);
    for (int key = 0; key < KEYS; key += TURBO_F32_LANES) {
        largest = turbo_f32_max(largest, turbo_f32_mul(turbo_f32_load(weights + key), turbo_f32_load(scales + key)));
    }
    const float limit = turbo_f32_largest(largest);
    // below 1e-30 all products are 0: the row's largest weight is 1, so such scales hold values that add nothing
    const turbo_f32 to_int16 = turbo_f32_set1(limit > 1e-30f ? MAX_INT16/limit : 0.0f);
    for (int key = 0; key < KEYS; key += TURBO_F32_LANES) {
        const turbo_f32 weight = turbo_f32_mul(turbo_f32_load(weights + key), turbo_f32_load(scales + key));
        turbo_f32_store_int16(rounded + key, turbo_f32_mul(weight, to_int16));
    }
    return limit/MAX_INT16;
}

// out[r] += unit[r] * sum over keys of weights * values; weights: [r][KEYS/2] words of two, values: [key/2][CHUNK].
template <int R>
void add_int16(const int32_t * weights, const float * units, const int32_t * values, int n_keys, float * out, int64_t out_stride) {
    constexpr int STEP = TURBO_VALUE_STEP;
    register_tile<R, STEP> total;
    for (int d = 0; d < CHUNK; d += VALUE_STEP) {
        turbo_i32 sum[R][STEP];
        total.each([&](int r, int j) { sum[r][j] = turbo_i32_set1(0); });
        for (int pair = 0; 2*pair < n_keys; ++pair) {
            turbo_i32 v[STEP];
            for (int j = 0; j < STEP; ++j) {
                v[j] = turbo_i32_load(values + pair*CHUNK + d + j*TURBO_F32_LANES);
            }
            total.each([&](int r, int j) { sum[r][j] = turbo_i32_dot2(sum[r][j], v[j], weights[r*KEYS/2 + pair]); });
        }
        total.load(out + d, out_stride);
        total.each([&](int r, int j) {
            total.x[r][j] = turbo_f32_fma(turbo_f32_from_i32(sum[r][j]), turbo_f32_set1(units[r]), total.x[r][j]);
        });
        total.store(out + d, out_stride);
    }
}

// The same with float32 weights and values.
template <int R>
void add_f32(const float * weights, const float * values, int n_keys, float * out, int64_t out_stride) {
    constexpr int STEP = TURBO_VALUE_STEP;
    register_tile<R, STEP> total;
    for (int d = 0; d < CHUNK; d += VALUE_STEP) {
        total.load(out + d, out_stride);
        for (int key = 0; key < n_keys; ++key) {
            turbo_f32 v[STEP];
            for (int j = 0; j < STEP; ++j) {
                v[j] = turbo_f32_load(values + key*CHUNK + d + j*TURBO_F32_LANES);
            }
            total.each([&](int r, int j) {
                total.x[r][j] = turbo_f32_fma(turbo_f32_set1(weights[r*KEYS + key]), v[j], total.x[r][j]);
            });
        }
        total.store(out + d, out_stride);
    }
}

// Calls f with 4 rows at a time, then with what is left: f(first row, its count as a constant).
template <typename F>
void by_rows(int n_rows, F && f) {
    int r = 0;
    for (; r + 4 <= n_rows; r += 4) {
        f(r, std::integral_constant<int, 4>());
    }
    switch (n_rows - r) {
        case 3: f(r, std::integral_constant<int, 3>()); break;
        case 2: f(r, std::integral_constant<int, 2>()); break;
        case 1: f(r, std::integral_constant<int, 1>()); break;
    }
}

bool sees_any(const uint16_t * mask, int keys) {
    uint16_t bits = 0;
    for (int key = 0; key < keys; ++key) {
        bits |= mask[key] ^ HALF_MINUS_INFINITY;
    }
    return bits != 0;
}

// exp(x) for x <= 0, exactly 0 below -87; relative error under 2^-22 (Taylor's polynomial on |r| <= ln(2)/2).
turbo_f32 exp_negative(turbo_f32 x) {
    const turbo_f32 n = turbo_f32_round(turbo_f32_mul(x, turbo_f32_set1(1.44269504f)));
    turbo_f32 r = turbo_f32_fma(n, turbo_f32_set1(-0.693359375f), x); // ln(2) in two parts
    r = turbo_f32_fma(n, turbo_f32_set1(2.12194440e-4f), r);
    turbo_f32 y = turbo_f32_set1(1.0f/720);
    for (float c : { 1.0f/120, 1.0f/24, 1.0f/6, 0.5f, 1.0f, 1.0f }) {
        y = turbo_f32_fma(y, r, turbo_f32_set1(c));
    }
    return turbo_f32_zero_below(turbo_f32_scale2(y, n), x, turbo_f32_set1(-87.0f));
}

// ---- the operator ----

struct partial { // of a row over a range of keys
    float   largest = -INFINITY; // score
    float   total   = 0.0f;      // of exp(score - largest)
    float * out     = nullptr;   // [head size of V], weighted by exp(score - largest)

    void rescale(float new_largest, int64_t n) {
        if (largest != new_largest) {
            const float factor = largest == -INFINITY ? 0.0f : expf(largest - new_largest);
            total *= factor;
            for (int64_t i = 0; i < n; ++i) {
                out[i] *= factor;
            }
            largest = new_largest;
        }
    }
};

// One thread's memory; pointers into ggml's work buffer.
struct scratch {
    float *   query;       // [ROWS][head size of K]
    int8_t *  query_int8;  // [ROWS][head size of K], for turbo keys
    float *   query_scale; // [ROWS][chunks of K]
    int32_t * query_sum;   // [ROWS][chunks of K]
    float *   keys;        // [head size of K][KEYS], float32 or int8
    float *   key_scale;   // [chunks of K][KEYS]
    float *   rows;        // [KEYS][CHUNK]: keys before they are transposed, later values
    float *   value_scale; // [KEYS]
    float *   scores;      // [ROWS][KEYS], then weights
    int16_t * weights;     // [ROWS][KEYS], rounded
    float *   units;       // [ROWS] of the rounded weights
    float *   out;         // [ROWS][head size of V]
    uint16_t * masks;      // [ROWS][KEYS], where those of the operator do not serve
    float *   memory;      // all of the above; null: only counted
    size_t    used = 0;    // floats of it

    scratch(float * work, int64_t size_k, int64_t size_v) : memory(work) {
        query       = take(ROWS*size_k);
        query_int8  = (int8_t *) take(ROWS*size_k/4);
        keys        = take(KEYS*size_k);
        rows        = take(KEYS*CHUNK);
        scores      = take(ROWS*KEYS);
        weights     = (int16_t *) take(ROWS*KEYS/2);
        out         = take(ROWS*size_v);
        query_scale = take(ROWS*(size_k/CHUNK));
        query_sum   = (int32_t *) take(ROWS*(size_k/CHUNK));
        key_scale   = take(KEYS*(size_k/CHUNK));
        value_scale = take(KEYS);
        units       = take(ROWS);
        masks       = (uint16_t *) take(ROWS*KEYS/2);
    }

    float * take(size_t n) {
        used += n;
        return memory ? memory + used - n : nullptr;
    }

    static size_t floats(int64_t size_k, int64_t size_v) {
        return scratch(nullptr, size_k, size_v).used;
    }
};

// Some of the keys, with their values. One operator has up to three: those of the cache, and with a recent window those of
// its ring and of the batch.
struct part {
    const ggml_tensor * k, * v;
    const ggml_tensor * mask;    // null: every query sees every key
    int64_t             column;  // of the mask, of the first key
    const ggml_tensor * columns; // null, or of the cache's keys in the window's mask
    const ggml_tensor * tiles;   // null, or of each key, from index tile on: which number of a query is added to its product
    int64_t             tile;

    int64_t n_keys() const { return k->ne[1]; }

    bool is_supported() const {
        auto decodes = [](const ggml_tensor * t) {
            return t->ne[0] % CHUNK == 0 && CHUNK % ggml_blck_size(t->type) == 0 && t->nb[0] == ggml_type_size(t->type) &&
                   (t->type == GGML_TYPE_F32 || ggml_get_type_traits(t->type)->to_float);
        };
        return decodes(k) && decodes(v) && k->ne[2] == v->ne[2] && k->ne[3] == v->ne[3] && (!mask || mask->type == GGML_TYPE_F16);
    }
};

// Which keys of a tile the recent window has, too.
struct covered {
    const int32_t * columns; // of the window's mask
    int             keys;
    bool            any, all_in_a_row;

    covered(const part & p, int64_t stream, int64_t key0, int keys) : keys(keys), any(false), all_in_a_row(false) {
        if (!p.columns) {
            return;
        }
        columns = (const int32_t *) ((const char *) p.columns->data + stream*p.columns->nb[3]) + key0;
        int32_t none = -1, jumps = 0;
        for (int key = 0; key < keys; ++key) {
            none  &= columns[key];
            jumps |= columns[key] - columns[0] - key;
        }
        any          = none != -1;
        all_in_a_row = !jumps && columns[0] >= 0;
    }

    // Masks what a query sees in the window, whose mask this is.
    void hide(uint16_t * mask, const uint16_t * window) const {
        if (all_in_a_row) { // as the cells of a batch are
            for (int key = 0; key < keys; ++key) {
                mask[key] = window[columns[0] + key] != HALF_MINUS_INFINITY ? HALF_MINUS_INFINITY : mask[key];
            }
            return;
        }
        for (int key = 0; key < keys; ++key) {
            if (columns[key] >= 0 && window[columns[key]] != HALF_MINUS_INFINITY) {
                mask[key] = HALF_MINUS_INFINITY;
            }
        }
    }
};

struct attention {
    const ggml_tensor * dst, * q, * sinks;

    part parts[3];
    int  n_parts;

    ggml_tensor ring_k, ring_v; // of parts[1]

    float scale, max_bias, softcap;

    int64_t size_k, size_v;       // head sizes
    int64_t n_keys, n_queries;
    int64_t n_heads, n_kv_heads;  // of one stream
    int64_t group;                // query heads of a KV head
    int64_t n_rows;               // of one KV head
    int64_t n_tiles;              // of ROWS rows, of one KV head
    int64_t n_ranges, range_keys; // of keys
    int64_t n_streams, stream_group;

    explicit attention(const ggml_tensor * op) : dst(op), q(op->src[0]), sinks(op->src[4]), n_parts(1) {
        const float * factors = (const float *) op->op_params;
        parts[0] = { op->src[1], op->src[2], op->src[3], 0, nullptr, nullptr, 0 };
        if (turbo_is_window_attention(op)) {
            const ggml_tensor * mask = op->src[TURBO_WINDOW_MASK_W];
            factors = turbo_window_params(op);
            turbo_window_ring(op, &ring_k, &ring_v);
            const ggml_tensor * columns = op->src[TURBO_WINDOW_COLUMNS], * tiles = turbo_window_biases(op) > 0 ? columns : nullptr;
            const int64_t n_kv = parts[0].n_keys(), n_slots = ring_k.ne[1];
            parts[0].columns = columns, parts[0].tiles = tiles, parts[0].tile = n_kv;
            parts[1] = { &ring_k, &ring_v, mask, 0, nullptr, tiles, 2*n_kv };
            parts[2] = { op->src[TURBO_WINDOW_NEW_K], op->src[TURBO_WINDOW_NEW_V], mask, n_slots, nullptr, tiles, 2*n_kv + n_slots };
            n_parts  = 3;
        }
        scale = factors[0], max_bias = factors[1], softcap = factors[2];
        const ggml_tensor * k = parts[0].k, * v = parts[0].v;
        size_k = k->ne[0], size_v = v->ne[0];
        n_keys = k->ne[1], n_queries = q->ne[1];
        n_heads = q->ne[2], n_kv_heads = k->ne[2];
        group   = n_heads/n_kv_heads;
        n_rows  = group*n_queries;
        n_tiles = (n_rows + ROWS - 1)/ROWS;
        n_streams = q->ne[3], stream_group = q->ne[3]/k->ne[3];

        const int64_t tiles  = n_streams*n_kv_heads*n_tiles;
        const int64_t wanted = std::min((SPLIT_TASKS + tiles - 1)/tiles, (n_keys + SPLIT_KEYS - 1)/SPLIT_KEYS);
        range_keys = ((n_keys + wanted - 1)/wanted + KEYS - 1)/KEYS*KEYS;
        n_ranges   = (n_keys + range_keys - 1)/range_keys;
    }

    attention(const attention &) = delete;

    static bool supports(const ggml_tensor * op) {
        const attention a(op);
        const part & cache = a.parts[0];
        return (ggml_is_quantized(cache.k->type) || ggml_is_quantized(cache.v->type)) &&
               std::all_of(a.parts, a.parts + a.n_parts, [](const part & p) { return p.is_supported(); }) &&
               a.q->type == GGML_TYPE_F32 && a.q->nb[0] == sizeof(float) && cache.n_keys() > 0;
    }

    size_t partial_floats() const {
        return n_ranges == 1 ? 0 : n_streams*n_kv_heads*n_rows*n_ranges*(size_v + 2);
    }

    size_t work_size(int n_threads) const {
        return sizeof(float)*(partial_floats() + n_threads*scratch::floats(size_k, size_v));
    }

    // row of a KV head -> its query and query head; rows of one query are neighbours, so tiles see few distinct masks
    int64_t query_of(int64_t row) const { return row/group; }
    int64_t head_of(int64_t kv_head, int64_t row) const { return kv_head*group + row % group; }

    const uint16_t * mask_of(const part & p, int64_t stream, int64_t kv_head, int64_t row) const {
        return (const uint16_t *) ((const char *) p.mask->data + query_of(row)*p.mask->nb[1]
            + head_of(kv_head, row) % p.mask->ne[2]*p.mask->nb[2] + stream % p.mask->ne[3]*p.mask->nb[3]) + p.column;
    }

    // the values from c*64 on of a key's head
    const char * chunk(const ggml_tensor * t, int64_t stream, int64_t kv_head, int64_t key, int64_t c) const {
        return (const char *) t->data + key*t->nb[1] + kv_head*t->nb[2] + stream/stream_group*t->nb[3]
            + c*CHUNK/ggml_blck_size(t->type)*ggml_type_size(t->type);
    }

    // ---- the steps of a task ----

    void load_query(const scratch & s, int r, const float * x) const {
        const bool is_turbo = turbo_bits(parts[0].k->type);
        if (!is_turbo || n_parts > 1) {
            memcpy(s.query + r*size_k, x, size_k*sizeof(float));
        }
        if (!is_turbo) {
            return;
        }
        const int64_t chunks = size_k/CHUNK;
        for (int64_t c = 0; c < chunks; ++c) {
            int8_t * quantized = s.query_int8 + r*size_k + c*CHUNK;
            turbo_f32 lanes = turbo_f32_set1(0.0f);
            for (int i = c*CHUNK; i < (c + 1)*CHUNK; i += TURBO_F32_LANES) {
                const turbo_f32 v = turbo_f32_load(x + i);
                lanes = turbo_f32_max(lanes, turbo_f32_max(v, turbo_f32_sub(turbo_f32_set1(0.0f), v)));
            }
            const float largest = turbo_f32_largest(lanes);
            const float to_int8 = largest > 0.0f ? MAX_INT8/largest : 0.0f;
            int32_t sum = 0;
            for (int i = 0; i < CHUNK; ++i) {
                quantized[i] = (int8_t) rintf(x[c*CHUNK + i]*to_int8);
                sum += quantized[i];
            }
            s.query_scale[r*chunks + c] = largest/MAX_INT8;
            s.query_sum[r*chunks + c]   = sum;
        }
    }

    // What the rows of a tile see of some keys: keys [begin, end), by none but the rows of these runs. Where sequences share
    // a cache, most rows see nothing of most keys.
    struct view {
        struct run {
            int first, count;
        };

        int begin, end, n_runs;
        run runs[ROWS];

        // As by_rows, for the rows that see something.
        template <typename F>
        void by_rows(F && f) const {
            for (int i = 0; i < n_runs; ++i) {
                ::by_rows(runs[i].count, [&](int r, auto count) { f(runs[i].first + r, count); });
            }
        }

        template <typename F>
        void each_row(F && f) const {
            for (int i = 0; i < n_runs; ++i) {
                for (int r = runs[i].first; r < runs[i].first + runs[i].count; ++r) {
                    f(r);
                }
            }
        }
    };

    // masks: of KEYS entries, for the rows that see something.
    view load_masks(const scratch & s, const part & p, int64_t stream, int64_t kv_head, int64_t row0, int n, int64_t key0, int keys,
                    const uint16_t ** masks) const {
        const covered in_window(p, stream, key0, keys);
        uint16_t visible[KEYS] = {};
        view seen = { 0, KEYS, 0, {} };
        const uint16_t * before = nullptr;
        bool sees = false;
        for (int r = 0; r < n; ++r) {
            const uint16_t * m = p.mask ? mask_of(p, stream, kv_head, row0 + r) + key0 : nullptr;
            if (r > 0 && m == before) { // another head of the same query
                masks[r] = masks[r - 1];
            } else {
                before = masks[r] = m;
                sees   = !m || sees_any(m, keys);
                if (sees && (!m || keys < KEYS || in_window.any)) { // no mask is a mask of zeros; keys past the end are masked
                    uint16_t * own = s.masks + r*KEYS;
                    for (int key = 0; key < KEYS; ++key) {
                        own[key] = key >= keys ? HALF_MINUS_INFINITY : m ? m[key] : 0;
                    }
                    if (in_window.any) {
                        in_window.hide(own, mask_of(parts[1], stream, kv_head, row0 + r));
                        sees = sees_any(own, KEYS);
                    }
                    masks[r] = own;
                }
                for (int key = 0; sees && key < KEYS; ++key) {
                    visible[key] |= masks[r][key] ^ HALF_MINUS_INFINITY;
                }
            }
            if (!sees) {
                continue;
            }
            if (seen.n_runs > 0 && seen.runs[seen.n_runs - 1].first + seen.runs[seen.n_runs - 1].count == r) {
                ++seen.runs[seen.n_runs - 1].count;
            } else {
                seen.runs[seen.n_runs++] = { r, 1 };
            }
        }
        while (seen.end > 0 && !visible[seen.end - 1]) {
            --seen.end;
        }
        while (seen.begin < seen.end && !visible[seen.begin]) {
            ++seen.begin;
        }
        return seen;
    }

    void load_keys(const scratch & s, const ggml_tensor * k, int64_t stream, int64_t kv_head, int64_t key0, int keys) const {
        for (int64_t c = 0; c < size_k/CHUNK; ++c) {
            const char * from = chunk(k, stream, kv_head, key0, c);
            by_bits(k->type, [&](auto bits) {
                if constexpr (bits != 0) {
                    decode_int8<bits>(from, k->nb[1], keys, (int8_t *) s.rows, s.key_scale + c*KEYS);
                } else {
                    decode_f32(k->type, from, k->nb[1], keys, s.rows);
                }
                const int words = bits != 0 ? CHUNK/4 : CHUNK; // of 4 bytes, for each key
                transpose_tile((const int32_t *) s.rows, words, keys, (int32_t *) s.keys + c*words*KEYS);
            });
        }
    }

    void score(const scratch & s, ggml_type type_k, const view & seen) const {
        const int chunks = size_k/CHUNK, keys = seen.end;
        seen.by_rows([&](int r, auto count) {
            if (turbo_bits(type_k)) {
                score_int8<count>((const int32_t *) s.query_int8 + r*size_k/4, s.query_scale + r*chunks, s.query_sum + r*chunks,
                                  (const int32_t *) s.keys, s.key_scale, chunks, keys, s.scores + r*KEYS);
            } else {
                score_f32<count>(s.query + r*size_k, s.keys, size_k, keys, s.scores + r*KEYS);
            }
        });
    }

    // Adds to products of queries and keys what a query adds to those of a tile of positions. Scores of keys that nobody sees
    // may become any number.
    void add_biases(const scratch & s, const part & p, int64_t stream, int64_t key0, const view & seen, const float ** queries) const {
        const int32_t * tiles = (const int32_t *) ((const char *) p.tiles->data + stream*p.tiles->nb[3]) + p.tile + key0;
        int32_t others = 0;
        for (int key = seen.begin; key < seen.end; ++key) {
            others |= tiles[key] ^ tiles[seen.begin];
        }
        seen.each_row([&](int r) {
            const float * biases = queries[r] + size_k;
            float *       scores = s.scores + r*KEYS;
            if (others == 0) {
                const turbo_f32 bias = turbo_f32_set1(biases[tiles[seen.begin]]);
                for (int key = 0; key < scored(seen.end); key += TURBO_F32_LANES) {
                    turbo_f32_store(scores + key, turbo_f32_add(turbo_f32_load(scores + key), bias));
                }
            } else {
                for (int key = seen.begin; key < seen.end; ++key) {
                    scores[key] += biases[tiles[key]];
                }
            }
        });
    }

    // Scores of a row become weights; row_mask has KEYS entries, of which those from `keys` on are masked.
    void softmax(float * scores, const uint16_t * row_mask, int keys, float slope, partial & row) const {
        keys = scored(keys);
        turbo_f32 largest = turbo_f32_set1(-INFINITY);
        if (softcap != 0.0f) {
            for (int key = 0; key < keys; ++key) {
                scores[key] = softcap*tanhf(scores[key]*(scale/softcap));
            }
        }
        const turbo_f32 factor = turbo_f32_set1(softcap != 0.0f ? 1.0f : scale), slopes = turbo_f32_set1(slope);
        for (int key = 0; key < keys; key += TURBO_F32_LANES) {
            const turbo_f32 bias = turbo_f32_mul(slopes, turbo_f32_from_half(row_mask + key));
            const turbo_f32 x    = turbo_f32_fma(factor, turbo_f32_load(scores + key), bias);
            turbo_f32_store(scores + key, x);
            largest = turbo_f32_max(largest, x);
        }
        row.rescale(std::max(row.largest, turbo_f32_largest(largest)), size_v);
        // a row that has seen no key yet: every weight is 0
        const turbo_f32 offset = turbo_f32_set1(row.largest == -INFINITY ? 0.0f : -row.largest);
        turbo_f32 total = turbo_f32_set1(0.0f);
        for (int key = 0; key < keys; key += TURBO_F32_LANES) {
            const turbo_f32 w = exp_negative(turbo_f32_add(turbo_f32_load(scores + key), offset));
            turbo_f32_store(scores + key, w);
            total = turbo_f32_add(total, w);
        }
        row.total += turbo_f32_total(total);
        std::fill(scores + keys, scores + KEYS, 0.0f);
    }

    void add(const scratch & s, const ggml_tensor * v, int64_t stream, int64_t kv_head, int64_t key0, const view & seen) const {
        const int keys = seen.end;
        for (int64_t c = 0; c < size_v/CHUNK; ++c) {
            const char * from = chunk(v, stream, kv_head, key0, c);
            by_bits(v->type, [&](auto bits) {
                if constexpr (bits != 0) {
                    decode_int16<bits>(from, v->nb[1], keys, (int32_t *) s.rows, s.value_scale);
                    seen.each_row([&](int r) { s.units[r] = round_weights(s.scores + r*KEYS, s.value_scale, s.weights + r*KEYS); });
                } else {
                    decode_f32(v->type, from, v->nb[1], keys, s.rows);
                }
            });
            seen.by_rows([&](int r, auto count) {
                float * out = s.out + r*size_v + c*CHUNK;
                if (turbo_bits(v->type)) {
                    add_int16<count>((const int32_t *) s.weights + r*KEYS/2, s.units + r, (const int32_t *) s.rows, keys, out, size_v);
                } else {
                    add_f32<count>(s.scores + r*KEYS, s.rows, keys, out, size_v);
                }
            });
        }
    }

    // The attention sink joins last, as one more key without a value.
    void finish(int64_t stream, int64_t kv_head, int64_t row, partial & p) const {
        const int64_t h = head_of(kv_head, row);
        if (sinks) {
            const float sink = ((const float *) sinks->data)[h];
            p.rescale(std::max(p.largest, sink), size_v);
            p.total += expf(sink - p.largest);
        }
        const float inverse = p.total == 0.0f ? 0.0f : 1.0f/p.total;
        float * to = (float *) ((char *) dst->data + h*dst->nb[1] + query_of(row)*dst->nb[2] + stream*dst->nb[3]);
        for (int64_t i = 0; i < size_v; ++i) {
            to[i] = p.out[i]*inverse;
        }
    }

    float * partial_of(float * work, int64_t stream, int64_t kv_head, int64_t row, int64_t range) const {
        return work + (((stream*n_kv_heads + kv_head)*n_rows + row)*n_ranges + range)*(size_v + 2);
    }

    void run_task(int64_t task, const scratch & s, float * work) const {
        // heads first: those of a token lie side by side in the cache and share lines of memory
        const int64_t kv_head = task % n_kv_heads;
        const int64_t range   = task/n_kv_heads % n_ranges;
        const int64_t row0    = task/n_kv_heads/n_ranges % n_tiles*ROWS;
        const int64_t stream  = task/n_kv_heads/n_ranges/n_tiles;
        const int     n       = (int) std::min<int64_t>(ROWS, n_rows - row0);

        partial rows[ROWS];
        float   slopes[ROWS];
        const float * queries[ROWS];
        for (int r = 0; r < n; ++r) {
            const int64_t h = head_of(kv_head, row0 + r);
            queries[r] = (const float *) ((const char *) q->data + query_of(row0 + r)*q->nb[1] + h*q->nb[2] + stream*q->nb[3]);
            load_query(s, r, queries[r]);
            rows[r].out = s.out + r*size_v;
            slopes[r]   = turbo_alibi_slope(h, n_heads, max_bias);
        }
        std::fill_n(s.out, n*size_v, 0.0f);

        auto attend = [&](const part & p, int64_t begin, int64_t end) {
            for (int64_t key0 = begin; key0 < end; key0 += KEYS) {
                const uint16_t * masks[ROWS];
                const view seen = load_masks(s, p, stream, kv_head, row0, n, key0, (int) std::min<int64_t>(KEYS, end - key0), masks);
                if (seen.end == 0) {
                    continue;
                }
                if (seen.begin >= SCORE_STEP) { // a tile begins where there is something to see
                    key0 += seen.begin - KEYS;
                    continue;
                }
                load_keys(s, p.k, stream, kv_head, key0, seen.end);
                score(s, p.k->type, seen);
                if (p.tiles) {
                    add_biases(s, p, stream, key0, seen, queries);
                }
                seen.each_row([&](int r) { softmax(s.scores + r*KEYS, masks[r], seen.end, slopes[r], rows[r]); });
                add(s, p.v, stream, kv_head, key0, seen);
            }
        };
        attend(parts[0], range*range_keys, std::min(n_keys, (range + 1)*range_keys));
        for (int i = 1; i < n_parts && range == 0; ++i) {
            attend(parts[i], 0, parts[i].n_keys());
        }

        for (int r = 0; r < n; ++r) {
            if (n_ranges == 1) {
                finish(stream, kv_head, row0 + r, rows[r]);
            } else {
                float * to = partial_of(work, stream, kv_head, row0 + r, range);
                to[0] = rows[r].largest;
                to[1] = rows[r].total;
                memcpy(to + 2, rows[r].out, size_v*sizeof(float));
            }
        }
    }

    void merge(int64_t index, float * work) const {
        const int64_t row = index % n_rows, kv_head = index/n_rows % n_kv_heads, stream = index/n_rows/n_kv_heads;
        auto load = [&](int64_t range) {
            float * from = partial_of(work, stream, kv_head, row, range);
            partial p;
            p.largest = from[0], p.total = from[1], p.out = from + 2;
            return p;
        };
        partial sum = load(0);
        for (int64_t range = 1; range < n_ranges; ++range) {
            partial p = load(range);
            const float largest = std::max(sum.largest, p.largest);
            sum.rescale(largest, size_v);
            p.rescale(largest, size_v);
            sum.total += p.total;
            for (int64_t i = 0; i < size_v; ++i) {
                sum.out[i] += p.out[i];
            }
        }
        finish(stream, kv_head, row, sum);
    }

    void run(const ggml_compute_params * params) const {
        float * work = (float *) params->wdata;
        const scratch s(work + partial_floats() + params->ith*scratch::floats(size_k, size_v), size_k, size_v);

        if (params->ith == 0) {
            ggml_threadpool_chunk_set(params->threadpool, params->nth);
        }
        ggml_barrier(params->threadpool);
        const int64_t n_tasks = n_streams*n_kv_heads*n_tiles*n_ranges;
        for (int64_t task = params->ith; task < n_tasks; task = ggml_threadpool_chunk_add(params->threadpool, 1)) {
            run_task(task, s, work);
        }
        if (n_ranges > 1) {
            ggml_barrier(params->threadpool);
            for (int64_t i = params->ith; i < n_streams*n_kv_heads*n_rows; i += params->nth) {
                merge(i, work);
            }
        }
    }
};

// ---- ggml's side ----

struct attention_traits : ggml::cpu::tensor_traits {
    bool work_size(int n_threads, const ggml_tensor * op, size_t & size) override {
        size = attention(op).work_size(n_threads);
        return true;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        if (params->use_ref) { // the stock operator or the reference, which need less memory than work_size says
            return false;
        }
        attention(op).run(params);
        return true;
    }
};

}  // namespace

ggml::cpu::tensor_traits * turbo_attention_claims(const ggml_tensor * op) {
    static attention_traits traits;
    return attention::supports(op) ? &traits : nullptr;
}

#endif
