#pragma once

// Attention of 16 rows to a range of keys, 16 keys at a time, by one warp (docs/gpu.md).
//
// Rows       A row is one query of one of the query heads of a KV head. Keys and values are decoded once for all 16.
// Scores     Half precision products with float sums, of rows that are divided by a power of two, and of codebook
//            entries, which halves hold exactly; a key's scale multiplies the sum of its block. All in float32 from
//            there on, in powers of 2.
// Softmax    Online (arXiv 1805.02867). A row's reference need not be its largest score: it is raised where a score is
//            more than 8 above it, which is rare, so that lanes need not compare theirs at every tile.
// Values     Weights times the values' scales, as halves, times codebook entries. The products are divided by a power
//            of two of the warp's own, which is raised before a half would overflow.
// Slices     With CHUNKS = 2, a warp has heads of 128 whole and its own keys. With 1 it has one chunk of 64 channels:
//            where heads have more, as many warps take the same keys, and add up their parts of the scores.

#include "turbo-sources.cuh"

#include <cfloat>

#define TURBO_TILE_ROWS 16

#define TURBO_MASKED 0xfc00u // minus infinity as a half

// ---- what a launch is told ----

struct turbo_attention_source {
    const char * data;
    int64_t      key, head, stream; // strides, in bytes
    turbo_stock  type;              // of a stock type
    bool         aligned;           // a stock type's words of 4 bytes are
};

struct turbo_attention_mask { // halves
    const uint16_t * data;         // null: every query sees every key
    uint32_t query, head, stream;  // strides, in halves
    int      heads, streams;       // it repeats after as many
    bool     aligned;              // those of two neighbours are a word
};

// Some of the keys of an operator: those of a cache, of the recent window's ring or of the batch.
struct turbo_attention_part {
    turbo_attention_source k, v;
    turbo_attention_mask   mask;
    int                    n_keys;
    int                    range_keys, n_ranges; // ranges of keys, each with its own partial result
    int                    first_range;          // among the ranges of all parts
    turbo_attention_mask   window;               // of the recent window
    const char *           columns;              // null, or int32: each key's column there, -1 if it is not there
    const char * tiles; // null, or int32: which of a query's numbers is added to products with the key
    int64_t                columns_stream;       // stride of both, in bytes
};

struct turbo_attention_op {
    const char *  q;
    int64_t       q_query, q_head, q_stream; // strides, in bytes
    int           size_k, size_v;            // of a head
    int           n_queries, n_heads, n_kv_heads, n_streams;
    int           group;                     // query heads of a KV head
    int           stream_group;              // streams of queries of one of keys
    float         scale, max_bias, softcap;
    const float * sinks;                     // null, or a score for each head that no value belongs to
    float *       dst;
    int64_t       dst_head, dst_query, dst_stream; // strides, in floats
    int           n_ranges;                  // of all parts; 1: results are final
    float *       partials;                  // [row of all][range][size_v]
    float2 *      partial_sums;              // [row of all][range]: reference, sum of weights

    __host__ __device__ int n_rows() const { return group*n_queries; } // of a KV head
    __host__ __device__ int n_tiles() const { return (n_rows() + TURBO_TILE_ROWS - 1)/TURBO_TILE_ROWS; }
};

// ---- small things ----

static constexpr float turbo_log2e = 1.44269504088896f;

// Below every score: the difference to a score is finite, and its weight 0.
static constexpr float turbo_no_score = -FLT_MAX/2;

// How far a score may be above its row's reference, and how large a scale may be in the unit of the results: a weight
// of 2^8 times it is within halves, and so is one of 2^-28.
static constexpr float turbo_slack = 8.0f, turbo_most_scale = 64.0f;

// Whether it holds for a lane of the warp; the warp is half a wave where that has 64 lanes.
static __device__ __forceinline__ bool turbo_any(bool predicate) {
#if defined(GGML_USE_HIP)
    const unsigned long long all = __ballot(predicate);
    return warpSize == 32 ? all != 0 : (uint32_t) (all >> (threadIdx.x & 32)) != 0;
#else
    return __any_sync(TURBO_FULL_WARP, predicate) != 0;
#endif
}

static __device__ __forceinline__ float turbo_tanh(float x) { // tanhf may be an approximation to 11 bits
    return 1.0f - 2.0f/(1.0f + exp2f(2.0f*turbo_log2e*x));
}

// As turbo_alibi_slope of ops/turbo-window.h.
static __device__ __forceinline__ float turbo_slope(int head, int n_heads, float max_bias) {
    if (max_bias <= 0.0f) {
        return 1.0f;
    }
    const int power = 1 << (31 - __clz(n_heads));
    return head < power ? exp2f(-max_bias/power*(head + 1)) : exp2f(-max_bias/2/power*(2*(head - power) + 1));
}

// A row of a KV head: its query and query head. The last one stands in for those that are not there.
struct turbo_query_row {
    int stream, kv_head, index, query, head;

    __device__ __forceinline__ turbo_query_row(const turbo_attention_op & op, int stream, int kv_head, int index)
        : stream(stream), kv_head(kv_head), index(index), query(min(index, op.n_rows() - 1)/op.group),
          head(kv_head*op.group + min(index, op.n_rows() - 1) % op.group) {}

    __device__ __forceinline__ int64_t of_all(const turbo_attention_op & op) const {
        return ((int64_t) stream*op.n_kv_heads + kv_head)*op.n_rows() + index;
    }

    // Where the row's part of a mask begins, in halves.
    __device__ __forceinline__ uint32_t mask(const turbo_attention_mask & m) const {
        return query*m.query + head % m.heads*m.head + stream % m.streams*m.stream;
    }

    __device__ __forceinline__ float * dst(const turbo_attention_op & op) const {
        return op.dst + head*op.dst_head + query*op.dst_query + stream*op.dst_stream;
    }
};

// The index of the block of threads. It is read anew each time, so that what is found from it before a loop need not
// stay in registers until it is found again behind the loop.
static __device__ __forceinline__ int turbo_block() {
#if defined(__CUDA_ARCH__) && !defined(GGML_USE_HIP)
    int index;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
    return index;
#else
    return (int) blockIdx.x;
#endif
}

// What a block works on. The KV heads of a token lie side by side, so blocks that are neighbours read the same lines
// of memory.
struct turbo_place {
    int kv_head, range, tile, stream; // range: of the part

    __device__ __forceinline__ turbo_place(const turbo_attention_op & op, const turbo_attention_part & part) {
        int i = turbo_block();
        kv_head = i % op.n_kv_heads, i /= op.n_kv_heads;
        range   = i % part.n_ranges, i /= part.n_ranges;
        tile    = i % op.n_tiles(),  stream = i/op.n_tiles();
    }

    // Row g or g + 8 of a lane.
    __device__ __forceinline__ turbo_query_row row(const turbo_attention_op & op, int r) const {
        return turbo_query_row(op, stream, kv_head, TURBO_TILE_ROWS*tile + threadIdx.x % 32/4 + 8*r);
    }
};

// What a warp multiplies a row's products and its mask with, and where the mask is. In shared memory: registers are
// few.
struct turbo_row_factors {
    float    product, slope;
    uint32_t mask;
};

// What a row's sums are divided by, with its attention sink: one more key without a value.
static __device__ __forceinline__ float
turbo_divisor(const turbo_attention_op & op, int head, float reference, float total) {
    if (op.sinks) {
        const float sink = op.sinks[head]*turbo_log2e, top = fmaxf(reference, sink);
        total = total*exp2f(reference - top) + exp2f(sink - top);
        return total*exp2f(top - reference);
    }
    return total;
}

// ---- one warp ----

// CHUNKS: of the keys and values that a warp has. K, V: bits of a turbo type, 0 for a stock type.
template<int K, int V, int CHUNKS> struct turbo_attention {
    using keys   = turbo_staged<K == 0 ? 2 : K, CHUNKS>;
    using values = turbo_staged<V == 0 ? 2 : V, CHUNKS>;
    static constexpr bool sliced = CHUNKS == 1; // or may be
    static constexpr int  table_words  = K || V ? TURBO_BANKED_TABLE_WORDS : 0;
    static constexpr int  key_words    = K ? TURBO_TILE_KEYS*keys::words : 0;
    static constexpr int  value_words  = V ? TURBO_TILE_KEYS*values::words : 0;
    static constexpr int padding = K || V ? 4 : 0; // behind the last row: words are loaded that no value needs
    static constexpr int  stage_words  = key_words + value_words + padding; // of one tile
    static constexpr int  result_words = 32*(32*CHUNKS + 4); // a warp's result, as it hands it to another

    static constexpr int  row_words    = TURBO_TILE_ROWS*sizeof(turbo_row_factors)/4;
    static constexpr int  warp_words   = row_words + 2*stage_words;

    // Shared memory, in words: before the table there is room for what some warps have of their own, that of the
    // others is behind it. Then there is the memory by which warps exchange scores. In the end, results take the place
    // of all that.
    static __host__ __device__ __forceinline__ int memory_of(int warp, int before) {
        const int first = before/warp_words;
        return warp < first ? warp*warp_words : before + table_words + (warp - first)*warp_words;
    }
    static __host__ __device__ __forceinline__ int exchange(int warps, int before) {
        const int behind = before + table_words, end = memory_of(warps, before);
        return end > behind ? end : behind;
    }

    // How many there are for so many warps, of which `slices` share keys.
    static int shared_words(int warps, int slices, uint32_t begin) {
        const int before = table_words ? turbo_words_before_table(begin) : 0;
        const int used = exchange(warps, before) + (slices > 1 ? slices*32*8 : 0),
                  results = slices > 1 ? 0 : warps/2*result_words;
        return used > results ? used : results;
    }

    const turbo_attention_op &   op;
    const turbo_attention_part & part;
    uint32_t * const shared, * own;    // own: of this warp
    const int  lane, g, t, warp, warps;
    const int  slices, slice;          // the warps that share keys, and which this one is
    const bool has_keys, has_values;   // its chunk is one of the head's
    const turbo_banked_table table;

    uint32_t query[4*CHUNKS][4];
    uint32_t mask[2][2], ahead[2][2];  // of rows g and g + 8, keys 2t, 2t + 1 and 2t + 8, 2t + 9; of the next tile
    float    score[2][4];              // as C of turbo-mma.cuh, of keys 0 to 7 and 8 to 15
    float    reference[2], total[2];   // total: of this lane's keys
    float    out[CHUNKS][8][4];        // in units, a power of two
    float    inverse_unit;

    __device__ __forceinline__ turbo_attention(const turbo_attention_op & op, const turbo_attention_part & part,
                                               uint32_t * shared)
        : op(op), part(part), shared(shared), lane(threadIdx.x % 32), g(lane/4), t(lane % 4), warp(threadIdx.x/32),
          warps(blockDim.x/32), slices(sliced ? (max(op.size_k, op.size_v) + QK_TURBO - 1)/QK_TURBO : 1),
          slice(slices > 1 ? warp : 0), has_keys(!sliced || QK_TURBO*slice < op.size_k),
          has_values(!sliced || QK_TURBO*slice < op.size_v), table(shared + before_table(), lane) {
        own = shared + memory_of(warp, before_table());
    }

    __device__ __forceinline__ int before_table() const {
        return table_words ? turbo_words_before_table(turbo_shared_begin(shared)) : 0;
    }
    __device__ __forceinline__ uint32_t * stage(int i) const { return own + row_words + i*stage_words; }

    // Of rows g and g + 8.
    __device__ __forceinline__ turbo_row_factors & row_factors(int r) const {
        return ((turbo_row_factors *) own)[g + 8*r];
    }

    // ---- rows ----

    // What products are multiplied with.
    __device__ __forceinline__ float product_factor() const {
        return op.softcap != 0.0f ? op.scale/op.softcap : op.scale*turbo_log2e;
    }

    __device__ __forceinline__ void load_queries(const turbo_query_row (&rows)[2]) {
        const float factor = product_factor();
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float * q = (const float *) (op.q + rows[r].query*op.q_query + rows[r].head*op.q_head +
                                               rows[r].stream*op.q_stream) +
                              QK_TURBO*slice + 16*t;
            float largest = 0.0f;
            for (int i = 0; has_keys && i < 16*CHUNKS; ++i) {
                largest = fmaxf(largest, fabsf(q[i/16*QK_TURBO + i % 16]));
            }
            largest = fmaxf(largest, __shfl_xor_sync(TURBO_FULL_WARP, largest, 1, 32));
            largest = fmaxf(largest, __shfl_xor_sync(TURBO_FULL_WARP, largest, 2, 32));
            const turbo_unit unit = turbo_unit_of(largest);
            if (t == 0) {
                row_factors(r) = { unit.value*factor, turbo_slope(rows[r].head, op.n_heads, op.max_bias)*turbo_log2e,
                                   rows[r].mask(part.mask) };
            }
#pragma unroll
            for (int i = 0; i < 4*CHUNKS; ++i) {
                const float * x = q + i/4*QK_TURBO + i % 4*4;
                query[i][r]     = has_keys ? turbo_pack_halves(x[0]*unit.inverse, x[1]*unit.inverse) : 0;
                query[i][r + 2] = has_keys ? turbo_pack_halves(x[2]*unit.inverse, x[3]*unit.inverse) : 0;
            }
            reference[r] = turbo_no_score;
            total[r]     = 0.0f;
        }
#pragma unroll
        for (int i = 0; i < 32*CHUNKS; ++i) {
            out[i/32][i/4 % 8][i % 4] = 0.0f;
        }
        inverse_unit = 1.0995116e12f; // 2^40: the smallest scale is above its inverse
    }

    // ---- masks ----

    // Of two keys of which `there` are there.
    static __device__ __forceinline__ uint32_t load_pair(const uint16_t * mask, uint32_t first_key, int there) {
        const uint32_t first  = there < 1 ? TURBO_MASKED : mask ? mask[first_key] : 0;
        const uint32_t second = there < 2 ? TURBO_MASKED : mask ? mask[first_key + 1] : 0;
        return first | second << 16;
    }

    // Into `ahead`: of the tile from key0 on; keys from `end` on are hidden.
    __device__ __forceinline__ void load_mask(int key0, int end) {
        if (key0 + TURBO_TILE_KEYS <= end && (part.mask.aligned || !part.mask.data)) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const uint32_t * words = (const uint32_t *) (part.mask.data + (row_factors(r).mask + key0 + 2*t));
                ahead[r][0] = part.mask.data ? words[0] : 0;
                ahead[r][1] = part.mask.data ? words[4] : 0;
            }
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int key = key0 + 8*(i % 2) + 2*t;
                ahead[i/2][i % 2] = load_pair(part.mask.data, row_factors(i/2).mask + key, end - key);
            }
        }
    }

    // Hides keys that a row sees in the recent window.
    __device__ __forceinline__ void hide_window(const turbo_query_row (&rows)[2], int key0, int end) {
        const int32_t * columns = (const int32_t *) (part.columns + rows[0].stream*part.columns_stream) + key0 + 2*t;
        int column[4];
        bool any = false;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int key = i/2*8 + i % 2;
            column[i] = key0 + 2*t + key < end ? columns[key] : -1;
            any |= column[i] >= 0;
        }
        if (!turbo_any(any)) {
            return;
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int r = i/4, c = i % 4;
            if (column[c] >= 0 && part.window.data[rows[r].mask(part.window) + column[c]] != TURBO_MASKED) {
                const uint32_t keep = c % 2 ? 0x0000ffffu : 0xffff0000u;
                mask[r][c/2] = (mask[r][c/2] & keep) | (TURBO_MASKED << 16 & ~keep) | (TURBO_MASKED & ~keep);
            }
        }
    }

    __device__ __forceinline__ bool sees_any() const {
        constexpr uint32_t none = TURBO_MASKED | TURBO_MASKED << 16;
        return turbo_any(mask[0][0] != none || mask[0][1] != none || mask[1][0] != none || mask[1][1] != none);
    }

    // Bit i: whether a row sees key 2t, 2t + 1, 2t + 8, 2t + 9, for i = 0 .. 3.
    __device__ __forceinline__ unsigned seen() const {
        unsigned bits = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int shift = 16*(i % 2);
            const bool sees = (mask[0][i/2] >> shift & 0xffff) != TURBO_MASKED ||
                              (mask[1][i/2] >> shift & 0xffff) != TURBO_MASKED;
            bits |= (unsigned) sees << i;
        }
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2) {
            bits |= (unsigned) __shfl_xor_sync(TURBO_FULL_WARP, (int) bits, distance, 32);
        }
        return bits;
    }

    // ---- keys ----

    // odd: whether even and odd keys begin half a word late.
    template<int chunk>
    __device__ __forceinline__ void
    score_chunk(const uint32_t * staged, const char * k, int key0, int last, const int (&odd)[2]) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            uint32_t b[8];
            float    scale[2];
            if constexpr (K != 0) {
                uint32_t u[16];
                const uint32_t * rows = staged + 8*n*keys::words;
                keys::template entries<chunk>(rows + g*keys::words, table, t, g % 2 ? odd[1] : odd[0], u);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    b[i] = __byte_perm(u[2*i], u[2*i + 1], 0x5410);
                }
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    scale[i] = keys::template scale<chunk>(rows + (2*t + i)*keys::words, odd[i]);
                }
            } else {
                const int   key = min(key0 + 8*n + g, last);
                const float own = turbo_stock_halves<16>(part.k.type, part.k.aligned, k + key*part.k.key,
                                                         QK_TURBO*(slice + chunk) + 16*t, 3, b);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    scale[i] = __shfl_sync(TURBO_FULL_WARP, own, 4*(2*t + i), 32);
                }
            }
            float sum[4] = { 0.0f, 0.0f, 0.0f, 0.0f };
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                turbo_mma(sum, query[4*chunk + i], b[2*i], b[2*i + 1]);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                score[n][i] = chunk == 0 ? sum[i]*scale[i % 2] : score[n][i] + sum[i]*scale[i % 2];
            }
        }
    }

    // Adds up the slices' scores.
    __device__ __forceinline__ void exchange_scores() {
        float4 * memory = (float4 *) (shared + exchange(warps, before_table()));
        __syncthreads(); // all have read those of the tile before
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            memory[(2*slice + n)*32 + lane] = make_float4(score[n][0], score[n][1], score[n][2], score[n][3]);
        }
        __syncthreads();
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            float4 sum = memory[n*32 + lane];
            for (int i = 1; i < slices; ++i) {
                const float4 more = memory[(2*i + n)*32 + lane];
                sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
            }
            score[n][0] = sum.x, score[n][1] = sum.y, score[n][2] = sum.z, score[n][3] = sum.w;
        }
    }

    // Adds to products what the queries add to those with all keys of a tile of positions.
    __device__ __forceinline__ void add_biases(const turbo_query_row (&rows)[2], int key0, int end) {
        const float factor = product_factor();
        const int32_t * tiles = (const int32_t *) (part.tiles + rows[0].stream*part.columns_stream);
        int tile[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            tile[i] = tiles[min(key0 + i/2*8 + 2*t + i % 2, end - 1)];
        }
        const int first = __shfl_sync(TURBO_FULL_WARP, tile[0], 0, 32);
        const bool differs = turbo_any(tile[0] != first || tile[1] != first || tile[2] != first || tile[3] != first);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float * biases = (const float *) (op.q + rows[r].query*op.q_query + rows[r].head*op.q_head +
                                                    rows[r].stream*op.q_stream) +
                                   op.size_k;
            const float one = biases[first]*factor;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                score[i/2][2*r + i % 2] += differs ? biases[tile[i]]*factor : one;
            }
        }
    }

    // From products: factors of the rows, of which slices have their own; biases, cap, mask.
    __device__ __forceinline__ void finish_scores(const turbo_query_row (&rows)[2], int key0, int end) {
        const float product[2] = { row_factors(0).product, row_factors(1).product };
        const float slope[2]   = { row_factors(0).slope, row_factors(1).slope };
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            score[i/4][i % 4] *= product[i/2 % 2];
        }
        if (sliced && slices > 1) {
            exchange_scores();
        }
        if (part.tiles) {
            add_biases(rows, key0, end);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            float & s = score[i/4][i % 4];
            if (op.softcap != 0.0f) {
                s = op.softcap*turbo_log2e*turbo_tanh(s);
            }
            const uint32_t m = mask[i/2 % 2][i/4] >> 16*(i % 2) & 0xffff;
            s = K == 0 && m == TURBO_MASKED ? -INFINITY : s + turbo_low_half(m)*slope[i/2 % 2];
        }
    }

    // Scores become weights.
    __device__ __forceinline__ void weigh() {
        float top[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            top[r] = fmaxf(fmaxf(score[0][2*r], score[0][2*r + 1]), fmaxf(score[1][2*r], score[1][2*r + 1]));
        }
        if (turbo_any(top[0] > reference[0] + turbo_slack || top[1] > reference[1] + turbo_slack)) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                top[r] = fmaxf(top[r], __shfl_xor_sync(TURBO_FULL_WARP, top[r], 1, 32));
                top[r] = fmaxf(top[r], __shfl_xor_sync(TURBO_FULL_WARP, top[r], 2, 32));
                top[r] = fmaxf(top[r], reference[r]);
                scale_row(r, exp2f(reference[r] - top[r]));
                reference[r] = top[r];
            }
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            float & s = score[i/4][i % 4];
            s = exp2f(s - reference[i/2 % 2]);
            total[i/2 % 2] += s;
        }
    }

    __device__ __forceinline__ void scale_row(int r, float factor) {
        total[r] *= factor;
#pragma unroll
        for (int i = 0; i < 16*CHUNKS; ++i) {
            out[i/16][i/2 % 8][2*r + i % 2] *= factor;
        }
    }

    // ---- values ----

    // Of key i/2*8 + i%2 + 2t, in row g or g + 8.
    __device__ __forceinline__ float weight(int i, int r) const { return score[i/2][2*r + i % 2]; }

    template<int chunk>
    __device__ __forceinline__ void load_scales(const uint32_t * staged, const int (&odd)[2], float (&scale)[4]) const {
        if constexpr (V != 0) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                scale[i] = values::template scale<chunk>(staged + (i/2*8 + i % 2 + 2*t)*values::words, odd[i % 2]);
            }
        }
    }

    // Raises the unit of `out` where a weight times a scale would leave the range of halves, which is rare.
    __device__ __forceinline__ void fit_unit(const float (&scale)[CHUNKS][4]) {
        float sum = 0.0f; // scales are positive, so none is above their sum
#pragma unroll
        for (int i = 0; i < 4*CHUNKS; ++i) {
            sum += scale[i/4][i % 4];
        }
        if (!turbo_any(!(sum*inverse_unit <= turbo_most_scale))) {
            return;
        }
        // A scale counts as far as its largest weight is above 2^-16; what is below adds nothing next to it.
        float largest = 0.0f;
#pragma unroll
        for (int i = 0; i < 8*CHUNKS; ++i) {
            largest = fmaxf(largest, scale[i/8][i/2 % 4]*fminf(weight(i/2 % 4, i % 2)*65536.0f, 1.0f));
        }
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            largest = fmaxf(largest, __shfl_xor_sync(TURBO_FULL_WARP, largest, distance, 32));
        }
        const turbo_unit needed = turbo_unit_of(largest*0.25f);
        if (needed.inverse < inverse_unit) {
            const float factor = needed.inverse/inverse_unit;
#pragma unroll
            for (int i = 0; i < 32*CHUNKS; ++i) {
                out[i/32][i/4 % 8][i % 4] *= factor;
            }
            inverse_unit = needed.inverse;
        }
    }

    // Finite, so that a weight of 0 makes it 0; stock types have scales that are as large as floats.
    __device__ __forceinline__ float in_units(float scale) const {
        return V == 0 ? fminf(scale*inverse_unit, FLT_MAX) : scale*inverse_unit;
    }

    // Weights times scales, as A of turbo-mma.cuh; from here on neither is needed by itself.
    __device__ __forceinline__ void pack_weights(const float (&scale)[CHUNKS][4], uint32_t (&a)[CHUNKS][4]) {
        fit_unit(scale);
#pragma unroll
        for (int i = 0; i < 4*CHUNKS; ++i) {
            const int c = i/4, key = i % 4/2*2, r = i % 2; // key: of the four that this lane has
            a[c][i % 4] = turbo_pack_halves(weight(key, r)*in_units(scale[c][key]),
                                            weight(key + 1, r)*in_units(scale[c][key + 1]));
        }
    }

    __device__ __forceinline__ void add_staged_values(const uint32_t * staged, const int (&odd)[2]) {
        float    scale[CHUNKS][4];
        uint32_t a[CHUNKS][4];
        turbo_each<CHUNKS>([&](auto chunk) { load_scales<decltype(chunk)::value>(staged, odd, scale[chunk]); });
        pack_weights(scale, a);
        turbo_each<CHUNKS>([&](auto chunk) {
            uint32_t u[4][8];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t * row = staged + (i/2*8 + i % 2 + 2*t)*values::words;
                values::template entries<decltype(chunk)::value>(row, table, g, odd[i % 2], u[i]);
            }
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                turbo_mma(out[chunk][j], a[chunk], __byte_perm(u[0][j], u[1][j], 0x7632),
                          __byte_perm(u[2][j], u[3][j], 0x7632));
            }
        });
    }

    // Keys that no row sees add nothing, whatever lies there.
    __device__ __forceinline__ void add_stock_values(const char * v, int key0, int last) {
        const unsigned sees = seen();
        float    scale[CHUNKS][4];
        uint32_t halves[CHUNKS][4][4];
#pragma unroll
        for (int i = 0; i < 4*CHUNKS; ++i) {
            const int c = i/4, n = i % 4, key = min(key0 + n/2*8 + n % 2 + 2*t, last);
            scale[c][n] = turbo_stock_halves<8>(part.v.type, part.v.aligned, v + key*part.v.key,
                                                QK_TURBO*(slice + c) + 8*g, 28, halves[c][n]);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                halves[c][n][j] = sees >> n & 1 ? halves[c][n][j] : 0;
            }
            scale[c][n] = sees >> n & 1 ? scale[c][n] : 0.0f;
        }
        uint32_t a[CHUNKS][4];
        pack_weights(scale, a);
#pragma unroll
        for (int i = 0; i < 8*CHUNKS; ++i) {
            const auto & h = halves[i/8];
            const int j = i % 8, which = j % 2 ? 0x7632 : 0x5410;
            turbo_mma(out[i/8][j], a[i/8], __byte_perm(h[0][j/2], h[1][j/2], which),
                      __byte_perm(h[2][j/2], h[3][j/2], which));
        }
    }

    // ---- all of it ----

    __device__ __forceinline__ void run() {
        const turbo_place place(op, part);
        const turbo_query_row rows[2] = { place.row(op, 0), place.row(op, 1) };
        const int begin = place.range*part.range_keys, end = min(begin + part.range_keys, part.n_keys);
        if constexpr (table_words > 0) {
            turbo_fill_banked_table<K, V>(shared + before_table());
        }
        if (padding > 0 && lane < 2) { // behind the last rows, of keys and of values
            stage(lane)[key_words] = stage(lane)[key_words + value_words] = 0;
        }
        load_queries(rows);
        __syncthreads();

        const int    kv_stream = place.stream/op.stream_group;
        const char * k = part.k.data + place.kv_head*part.k.head + kv_stream*part.k.stream;
        const char * v = part.v.data + place.kv_head*part.v.head + kv_stream*part.v.stream;
        int odd_keys[2] = { 0, 0 }, odd_values[2] = { 0, 0 };
        if constexpr (K != 0) {
            k += slice*TURBO_BLOCK_BYTES(K);
        }
        if constexpr (V != 0) {
            v += slice*TURBO_BLOCK_BYTES(V);
        }
#pragma unroll
        for (int i = 0; sliced && i < 2; ++i) {
            odd_keys[i]   = (uintptr_t) (k + i*part.k.key) >> 1 & 1;
            odd_values[i] = (uintptr_t) (v + i*part.v.key) >> 1 & 1;
        }
        const auto copy = [&](int key0, int i) {
            if constexpr (K != 0) {
                if (has_keys) {
                    keys::copy(stage(i), k + begin*part.k.key, (uint32_t) part.k.key, key0 - begin, end - key0, lane);
                }
            }
            if constexpr (V != 0) {
                if (has_values) {
                    values::copy(stage(i) + key_words, v + begin*part.v.key, (uint32_t) part.v.key, key0 - begin,
                                 end - key0, lane);
                }
            }
        };

        const int own = slices > 1 ? 0 : warp, step = TURBO_TILE_KEYS*(slices > 1 ? 1 : warps);
        int  key0 = begin + TURBO_TILE_KEYS*own, current = 0;
        if (key0 < end) {
            copy(key0, 0);
            load_mask(key0, end);
        }
        turbo_commit_copies();
        for (; key0 < end; key0 += step, current ^= 1) {
            const int next = key0 + step;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                mask[i/2][i % 2] = ahead[i/2][i % 2];
            }
            if (next < end) {
                copy(next, current ^ 1);
                load_mask(next, end);
            }
            turbo_commit_copies();
            if (part.columns) {
                hide_window(rows, key0, end);
            }
            turbo_wait_for_copies();
            turbo_sync_warp();
            if (sees_any()) {
                if (has_keys) {
                    turbo_each<CHUNKS>([&](auto chunk) {
                        score_chunk<decltype(chunk)::value>(stage(current), k, key0, end - 1, odd_keys);
                    });
                } else {
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        score[i/4][i % 4] = 0.0f;
                    }
                }
                finish_scores(rows, key0, end);
                weigh();
                if (has_values) {
                    if constexpr (V != 0) {
                        add_staged_values(stage(current) + key_words, odd_values);
                    } else {
                        add_stock_values(v, key0, end - 1);
                    }
                }
            }
            turbo_sync_warp(); // the stage is read
        }
        finish();
        if (slices == 1) {
            merge_warps();
        }
        if (slices > 1 || warp == 0) {
            const turbo_place again(op, part);
            const turbo_query_row its_rows[2] = { again.row(op, 0), again.row(op, 1) };
            store(its_rows, part.first_range + again.range, op.n_ranges == 1);
        }
    }

    // Results without units, and with the sums of all lanes.
    __device__ __forceinline__ void finish() {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            total[r] += __shfl_xor_sync(TURBO_FULL_WARP, total[r], 1, 32);
            total[r] += __shfl_xor_sync(TURBO_FULL_WARP, total[r], 2, 32);
        }
#pragma unroll
        for (int i = 0; i < 32*CHUNKS; ++i) {
            out[i/32][i/4 % 8][i % 4] /= inverse_unit;
        }
    }

    // The results of all warps come together in the first one.
    __device__ __forceinline__ void merge_warps() {
        for (int n = warps; n > 1; n = (n + 1)/2) {
            const int half = (n + 1)/2;
            __syncthreads();
            if (warp >= half && warp < n) {
                float * to = (float *) shared + (warp - half)*result_words + lane;
#pragma unroll
                for (int i = 0; i < 32*CHUNKS; ++i) {
                    to[32*i] = out[i/32][i/4 % 8][i % 4];
                }
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    to[32*(32*CHUNKS + r)]     = reference[r];
                    to[32*(32*CHUNKS + 2 + r)] = total[r];
                }
            }
            __syncthreads();
            if (warp < n - half) {
                const float * from = (const float *) shared + warp*result_words + lane;
                float factor[2];
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const float other = from[32*(32*CHUNKS + r)], top = fmaxf(reference[r], other);
                    scale_row(r, exp2f(reference[r] - top));
                    factor[r]    = exp2f(other - top);
                    total[r]    += from[32*(32*CHUNKS + 2 + r)]*factor[r];
                    reference[r] = top;
                }
#pragma unroll
                for (int i = 0; i < 32*CHUNKS; ++i) {
                    out[i/32][i/4 % 8][i % 4] += from[32*i]*factor[i/2 % 2];
                }
            }
        }
    }

    __device__ __forceinline__ void store(const turbo_query_row (&rows)[2], int range, bool is_final) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            if (rows[r].index >= op.n_rows()) {
                continue;
            }
            float * to;
            float   factor = 1.0f;
            if (is_final) {
                const float divisor = turbo_divisor(op, rows[r].head, reference[r], total[r]);
                factor = divisor == 0.0f ? 0.0f : 1.0f/divisor;
                to     = rows[r].dst(op);
            } else {
                const int64_t i = rows[r].of_all(op)*op.n_ranges + range;
                to = op.partials + i*op.size_v;
                if (slice == 0 && t == 0) {
                    op.partial_sums[i] = make_float2(reference[r], total[r]);
                }
            }
#pragma unroll
            for (int i = 0; i < 4*CHUNKS; ++i) {
                const int c = i/4, j = i % 2*4, column = i/2 % 2;
                const auto & o = out[c];
                if (has_values) {
                    *(float4 *) (to + QK_TURBO*(slice + c) + 16*t + 8*column + j) =
                        make_float4(o[j][2*r + column]*factor, o[j + 1][2*r + column]*factor,
                                    o[j + 2][2*r + column]*factor, o[j + 3][2*r + column]*factor);
                }
            }
        }
    }
};

// ---- kernels ----

template<int K, int V, int CHUNKS>
static __global__ void __launch_bounds__(384)
    turbo_attend(const turbo_attention_op op, const turbo_attention_part part) {
    extern __shared__ __align__(16) uint32_t turbo_attention_memory[];
    turbo_attention<K, V, CHUNKS>(op, part, turbo_attention_memory).run();
}

// One softmax over all ranges of keys. A block of threads is a row, blocks are rows of all streams.
static __global__ void turbo_combine(const turbo_attention_op op) {
    const int64_t i = blockIdx.x;
    const turbo_query_row row(op, (int) (i/op.n_rows()/op.n_kv_heads), (int) (i/op.n_rows() % op.n_kv_heads),
                              (int) (i % op.n_rows()));
    const float2 * sums = op.partial_sums + i*op.n_ranges;
    float reference = turbo_no_score;
    for (int range = 0; range < op.n_ranges; ++range) {
        reference = fmaxf(reference, sums[range].x);
    }
    float total = 0.0f;
    for (int range = 0; range < op.n_ranges; ++range) {
        total += sums[range].y*exp2f(sums[range].x - reference);
    }
    const float divisor = turbo_divisor(op, row.head, reference, total), factor = divisor == 0.0f ? 0.0f : 1.0f/divisor;
    for (int channel = threadIdx.x; channel < op.size_v; channel += blockDim.x) {
        const float * from = op.partials + i*op.n_ranges*op.size_v + channel;
        float sum = 0.0f;
        for (int range = 0; range < op.n_ranges; ++range) {
            sum += from[range*op.size_v]*exp2f(sums[range].x - reference);
        }
        row.dst(op)[channel] = sum*factor;
    }
}
