#pragma once

// Attention of many rows: the keys are taken in slabs. One kernel unpacks a slab of keys and values to halves, once
// for all rows, in the very order in which lanes hold them; another attends to it and goes on from the state that the
// slab before left. So the memory for it depends on neither the number of keys nor the types.

#include "turbo-attention.cuh"

// What 16 keys have of a chunk, as words: halves for each lane, four words at a time, then a float for each key.
static constexpr int turbo_slab_halves = TURBO_TILE_KEYS*QK_TURBO/2;
static constexpr int turbo_slab_words  = turbo_slab_halves + TURBO_TILE_KEYS;

static constexpr int turbo_unpack_warps = 8, turbo_unpack_tiles = 4; // of a block; of a warp

// 16 keys' or values' chunk of a source, from row 0 on.
struct turbo_unpack_tile {
    turbo_stock  type;
    bool         aligned;
    const char * from;   // the head of the first key
    int64_t      stride;
    int          keys;   // that are there; the last one stands in for others
    int          chunk;

    __device__ __forceinline__ const char * row(int key) const { return from + min(key, keys - 1)*stride; }
};

static __device__ __forceinline__ void turbo_store_halves(uint4 * to, int lane, const uint32_t (&words)[16]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        to[32*i + lane] = make_uint4(words[4*i], words[4*i + 1], words[4*i + 2], words[4*i + 3]);
    }
}

// Blocks of the grid: tiles of keys; chunks of all heads; streams.
template<int BITS, bool VALUES>
static __global__ void __launch_bounds__(32*turbo_unpack_warps) turbo_unpack(
        const turbo_attention_source source, uint32_t * slab, int chunks, int first_key, int n_keys) {
    using staged = turbo_staged<BITS == 0 ? 2 : BITS, 1>;
    constexpr int stage_words = TURBO_TILE_KEYS*staged::words + 4;
    extern __shared__ __align__(16) uint32_t turbo_attention_memory[];
    const int lane = threadIdx.x % 32, g = lane/4, t = lane % 4, warp = threadIdx.x/32;
    const int head = blockIdx.y/chunks, chunk = blockIdx.y % chunks, stream = blockIdx.z;
    const int before = BITS ? turbo_words_before_table(turbo_shared_begin(turbo_attention_memory)) : 0;
    const turbo_banked_table table(turbo_attention_memory + before, lane);
    uint32_t * stage = turbo_attention_memory + before + TURBO_BANKED_TABLE_WORDS + warp*stage_words;
    if constexpr (BITS != 0) {
        turbo_fill_banked_table<BITS, 0>(turbo_attention_memory + before);
        if (lane == 0) {
            stage[stage_words - 4] = 0; // loaded, and of no value
        }
    }
    __syncthreads();

    const int n_tiles = (n_keys + TURBO_TILE_KEYS - 1)/TURBO_TILE_KEYS;
    for (int i = 0; i < turbo_unpack_tiles; ++i) {
        const int tile = (blockIdx.x*turbo_unpack_tiles + i)*turbo_unpack_warps + warp, key0 = TURBO_TILE_KEYS*tile;
        if (tile >= n_tiles) {
            return;
        }
        const char * from =
            source.data + head*source.head + stream*source.stream + (int64_t) (first_key + key0)*source.key;
        const turbo_unpack_tile rows = { source.type, source.aligned, from, source.key, n_keys - key0, chunk };
        uint32_t * to = slab + (((int64_t) stream*(gridDim.y/chunks) + head)*n_tiles*chunks +
                                (int64_t) tile*chunks + chunk) *
                                   turbo_slab_words;
        float * scales = (float *) (to + turbo_slab_halves);
        uint32_t words[16];
        if constexpr (BITS != 0) {
            const char * block = from + chunk*TURBO_BLOCK_BYTES(BITS);
            const auto odd = [&](int key) {
                return (int) ((uintptr_t) (block + min(key, n_keys - key0 - 1)*source.key) >> 1 & 1);
            };
            turbo_sync_warp(); // the tile before is read
            staged::copy(stage, block, (uint32_t) source.key, 0, n_keys - key0, lane);
            turbo_commit_copies();
            turbo_commit_copies(); // so that the one before is waited for
            turbo_wait_for_copies();
            turbo_sync_warp();
            if (lane < TURBO_TILE_KEYS) {
                scales[lane] = staged::template scale<0>(stage + lane*staged::words, odd(lane));
            }
            if constexpr (VALUES) {
                uint32_t u[4][8];
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const int key = k/2*8 + k % 2 + 2*t;
                    staged::template entries<0>(stage + key*staged::words, table, g, odd(key), u[k]);
                }
#pragma unroll
                for (int j = 0; j < 16; ++j) {
                    words[j] = __byte_perm(u[j % 2*2][j/2], u[j % 2*2 + 1][j/2], 0x5410);
                }
            } else {
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    uint32_t u[16];
                    staged::template entries<0>(stage + (8*n + g)*staged::words, table, t, odd(8*n + g), u);
#pragma unroll
                    for (int j = 0; j < 8; ++j) {
                        words[8*n + j] = __byte_perm(u[2*j], u[2*j + 1], 0x5410);
                    }
                }
            }
        } else if constexpr (VALUES) {
            uint32_t h[4][4];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const int key = k/2*8 + k % 2 + 2*t;
                const float scale =
                    turbo_stock_halves<8>(rows.type, rows.aligned, rows.row(key), QK_TURBO*chunk + 8*g, 28, h[k]);
                if (g == 0) {
                    scales[key] = scale;
                }
            }
#pragma unroll
            for (int j = 0; j < 16; ++j) {
                words[j] = __byte_perm(h[j % 2*2][j/4], h[j % 2*2 + 1][j/4], j/2 % 2 ? 0x7632 : 0x5410);
            }
        } else {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                uint32_t h[8];
                const float scale = turbo_stock_halves<16>(rows.type, rows.aligned, rows.row(8*n + g),
                                                           QK_TURBO*chunk + 16*t, 3, h);
                if (t == 0) {
                    scales[8*n + g] = scale;
                }
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    words[8*n + j] = h[j];
                }
            }
        }
        turbo_store_halves((uint4 *) to, lane, words);
    }
}

static inline int turbo_unpack_shared_bytes(int bits, uint32_t begin) { // for the most bits
    return bits == 0 ? 0
                     : 4*(turbo_words_before_table(begin) + TURBO_BANKED_TABLE_WORDS +
                            turbo_unpack_warps*(TURBO_TILE_KEYS*9 + 4));
}

// A slab, for a launch.
struct turbo_slab {
    const uint32_t * keys, * values;
    int              n_tiles; // of keys, of one head
    bool             is_first, is_last;
};

// 16 rows for each warp of a block, which share the keys. Of heads of 64*CHUNKS.
template<int CHUNKS> struct turbo_slab_attention : turbo_attention<0, 0, CHUNKS> {
    using base = turbo_attention<0, 0, CHUNKS>;
    using base::op, base::part, base::lane, base::g, base::t, base::warps, base::shared, base::mask, base::ahead,
        base::score, base::out, base::reference, base::total, base::query, base::inverse_unit;

    static constexpr int part_words = CHUNKS*turbo_slab_words; // keys or values of a tile

    static __host__ __device__ int shared_words(int warps) { return warps*base::warp_words + 4*part_words; }

    __device__ __forceinline__ turbo_slab_attention(const turbo_attention_op & op, const turbo_attention_part & part,
                                                    uint32_t * shared)
        : base(op, part, shared) {}

    __device__ __forceinline__ uint32_t * stage(int i) const {
        return shared + warps*base::warp_words + 2*i*part_words;
    }

    // All threads of the block.
    __device__ __forceinline__ void copy(int i, const turbo_slab & slab, int64_t tile) const {
        for (int at = 4*threadIdx.x; at < part_words; at += 4*blockDim.x) {
            turbo_copy_quad_async(stage(i) + at, slab.keys + tile*part_words + at);
            turbo_copy_quad_async(stage(i) + part_words + at, slab.values + tile*part_words + at);
        }
    }

    __device__ __forceinline__ void score_keys(const uint32_t * k) {
#pragma unroll
        for (int i = 0; i < 2*CHUNKS; ++i) {
            const int chunk = i/2, n = i % 2;
            const uint4 * halves = (const uint4 *) (k + chunk*turbo_slab_words) + 64*n + lane;
            const float2 scale = *(const float2 *) (k + chunk*turbo_slab_words + turbo_slab_halves + 8*n + 2*t);
            float sum[4] = { 0.0f, 0.0f, 0.0f, 0.0f };
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const uint4 b = halves[32*j];
                turbo_mma(sum, query[4*chunk + 2*j],     b.x, b.y);
                turbo_mma(sum, query[4*chunk + 2*j + 1], b.z, b.w);
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float s = sum[j]*(j % 2 ? scale.y : scale.x);
                score[n][j] = chunk == 0 ? s : score[n][j] + s;
            }
        }
    }

    __device__ __forceinline__ void add_values(const uint32_t * v) {
        float    scale[CHUNKS][4];
        uint32_t a[CHUNKS][4];
        const unsigned sees = base::seen(); // what nobody sees may be NaN
#pragma unroll
        for (int i = 0; i < 4*CHUNKS; ++i) {
            const float s = ((const float *) (v + i/4*turbo_slab_words + turbo_slab_halves))[i % 4/2*8 + i % 2 + 2*t];
            scale[i/4][i % 4] = sees >> i % 4 & 1 ? s : 0.0f;
        }
        const uint32_t keep[2] = { (sees & 1 ? 0xffffu : 0) | (sees & 2 ? 0xffff0000u : 0),
                                   (sees & 4 ? 0xffffu : 0) | (sees & 8 ? 0xffff0000u : 0) };
        base::pack_weights(scale, a);
#pragma unroll
        for (int i = 0; i < 4*CHUNKS; ++i) {
            const uint4 b = ((const uint4 *) (v + i/4*turbo_slab_words))[32*(i % 4) + lane];
            turbo_mma(out[i/4][2*(i % 4)],     a[i/4], b.x & keep[0], b.y & keep[1]);
            turbo_mma(out[i/4][2*(i % 4) + 1], a[i/4], b.z & keep[0], b.w & keep[1]);
        }
    }

    // Where the slab before left off.
    __device__ __forceinline__ void load_state(const turbo_query_row (&rows)[2]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            if (rows[r].index >= op.n_rows()) {
                continue;
            }
            const int64_t i = rows[r].of_all(op)*op.n_ranges + part.first_range;
            const float2 sums = op.partial_sums[i];
            reference[r] = sums.x;
            total[r]     = t == 0 ? sums.y : 0.0f; // of all lanes
#pragma unroll
            for (int j = 0; j < 16*CHUNKS; ++j) {
                const int c = j/16, column = j/8 % 2;
                out[c][j % 8][2*r + column] = op.partials[i*op.size_v + QK_TURBO*c + 16*t + 8*column + j % 8];
            }
        }
        // In units that suit the state: the largest of it becomes about 1.
        float largest = 0.0f;
#pragma unroll
        for (int j = 0; j < 32*CHUNKS; ++j) {
            largest = fmaxf(largest, fabsf(out[j/32][j/4 % 8][j % 4]));
        }
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            largest = fmaxf(largest, __shfl_xor_sync(TURBO_FULL_WARP, largest, distance, 32));
        }
        if (largest > 0.0f) {
            inverse_unit = fminf(inverse_unit, turbo_unit_of(largest).inverse*4096.0f);
#pragma unroll
            for (int j = 0; j < 32*CHUNKS; ++j) {
                out[j/32][j/4 % 8][j % 4] *= inverse_unit;
            }
        }
    }

    __device__ __forceinline__ void
    run(const turbo_slab & slab, int kv_head, int stream, const turbo_query_row (&rows)[2]) {
        base::load_queries(rows);
        if (!slab.is_first) {
            load_state(rows);
        }
        turbo_sync_warp(); // factors of rows are written
        const int64_t tile0 = ((int64_t) (stream/op.stream_group)*op.n_kv_heads + kv_head)*slab.n_tiles;
        copy(0, slab, tile0);
        turbo_commit_copies();
        base::load_mask(0, part.n_keys);
        for (int tile = 0; tile < slab.n_tiles; ++tile) {
            const int key0 = TURBO_TILE_KEYS*tile;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                mask[i/2][i % 2] = ahead[i/2][i % 2];
            }
            if (tile + 1 < slab.n_tiles) {
                copy(~tile & 1, slab, tile0 + tile + 1);
                base::load_mask(key0 + TURBO_TILE_KEYS, part.n_keys);
            }
            turbo_commit_copies();
            if (part.columns) {
                base::hide_window(rows, key0, part.n_keys);
            }
            turbo_wait_for_copies();
            __syncthreads();
            if (base::sees_any()) {
                score_keys(stage(tile & 1));
                base::finish_scores(rows, key0, part.n_keys);
                base::weigh();
                add_values(stage(tile & 1) + part_words);
            }
            __syncthreads(); // the stage is read
        }
        base::finish();
        base::store(rows, part.first_range, op.n_ranges == 1 && slab.is_last);
    }
};

template<int CHUNKS>
static __global__ void __launch_bounds__(256, 1)
    turbo_attend_slab(const turbo_attention_op op, const turbo_attention_part part, const turbo_slab slab) {
    extern __shared__ __align__(16) uint32_t turbo_attention_memory[];
    const int rows_of_block = blockDim.x/32*TURBO_TILE_ROWS, n_blocks = (op.n_rows() + rows_of_block - 1)/rows_of_block;
    const int block = blockIdx.x % n_blocks, kv_head = blockIdx.x/n_blocks % op.n_kv_heads,
              stream = blockIdx.x/n_blocks/op.n_kv_heads;
    const int row = rows_of_block*block + threadIdx.x/32*TURBO_TILE_ROWS + threadIdx.x % 32/4;
    const turbo_query_row rows[2] = { turbo_query_row(op, stream, kv_head, row),
                                      turbo_query_row(op, stream, kv_head, row + 8) };
    turbo_slab_attention<CHUNKS> attention(op, part, turbo_attention_memory);
    attention.run(slab, kv_head, stream, rows);
}
