#pragma once

// What the host tells the kernels. The same text is C++ and Metal. Strides are in bytes unless a comment says
// otherwise.

#include "format/turbo-block.h"

// Numbers of the function constants. Kernels of one library share them.
#define TURBO_CONSTANT_TYPE    0 // of floats, or of keys
#define TURBO_CONSTANT_TYPE_V  1
#define TURBO_CONSTANT_BITS    2 // of a code
#define TURBO_CONSTANT_INDEX   3 // bytes of a row's index; 0: rows have none
#define TURBO_CONSTANT_SIZE_K  4
#define TURBO_CONSTANT_FLAGS   5

// Types of values that are read; 2, 3 and 4 are the turbo types.
#define TURBO_VALUES_F16  0
#define TURBO_VALUES_F32  1
#define TURBO_VALUES_Q8_0 8
#define TURBO_VALUES_Q4_0 9

// What attention has beside keys and values, and a product beside weights and columns
#define TURBO_HAS_MASK    1
#define TURBO_HAS_CACHE   2 // keys are the cache's: what a query sees in the window is hidden (ops/turbo-window.h)
#define TURBO_HAS_TILES   4 // the query has a number for each tile of keys
#define TURBO_HAS_EXPERTS 8 // each token names the slices of weights for its columns

#define TURBO_DECODED_AT_ONCE 16 // blocks of a threadgroup of turbo_decode
#define TURBO_KEYS            32 // of a tile of attention; weight rows of a tile of MUL_MAT
#define TURBO_COLUMNS         32 // of a tile of MUL_MAT
#define TURBO_HIDDEN          (-1.7e38f) // a score that no key has; infinities are nothing that fast math respects

// A tile of 32 decoded rows is multiplied with 8*M rows of floats, of which so many channels are at hand at a time:
// with many rows half of a block, which costs two barriers and saves threadgroup memory.
#define TURBO_CHANNELS(M) ((M) == 4 ? QK_TURBO/2 : QK_TURBO)

// Rows of floats and rows of blocks, or two of blocks. first: of floats, or what is copied; second: of blocks, or the
// copy.
typedef struct {
    uint32_t n_units;          // of a row: blocks; words of 16 bits, where blocks are copied
    uint32_t n1, n2, n3;       // rows
    uint32_t index_n2, index_n3; // indices repeat in the second and the third dimension
    uint64_t first_1, first_2, first_3;
    uint64_t second_1, second_2, second_3;
    uint64_t index_1, index_2, index_3;
} turbo_rows_args;

typedef struct {
    uint32_t n_values, n_rows, n_columns; // of a weight row; weight rows; columns of the other factor and the product
    uint32_t columns_step;                // from the columns of a threadgroup to its next ones
    uint32_t distinct;                    // columns of the other factor in a slice; then they repeat
    uint32_t n_slices;                    // in the third dimension of the product; or experts
    uint32_t repeats_2, repeats_3;        // slices of the product with the same weights
    uint32_t n_ids, n_used;               // names of experts: of all tokens, of a token
    uint64_t weight_1, weight_2, weight_3;
    uint64_t column_1, column_2, column_3;
    uint64_t product_1, product_2, product_3;
    uint64_t id_1, id_2;
} turbo_mul_mat_args;

// A row is a query of a head; rows of one head of keys are query*group + head % group.
typedef struct {
    uint32_t first_query, n_queries, n_keys, n_heads, group, n_streams;
    uint32_t padded_rows;              // of a head of keys: a whole number of tiles
    uint32_t first_part, n_splits, split_keys;
    uint32_t mask_heads, mask_streams; // the mask repeats
    uint32_t first_tile;               // in COLUMNS, of the first key
    float    scale, softcap, max_bias;
    uint64_t q_query, q_head, q_stream;
    uint64_t k_key, k_head, k_stream;
    uint64_t v_key, v_head, v_stream;
    uint64_t mask_query, mask_head, mask_stream;
    uint64_t window_query, window_stream, columns_stream;
} turbo_attention_args;

typedef struct {
    uint32_t n_parts, size_v, group, n_streams, n_kv_heads, padded_rows;
    uint32_t first_query, all_queries, has_sinks;
} turbo_combine_args;

// Threadgroup memory of the kernels, whose size the host asks for. Codebooks are halves.

typedef struct {
    uint16_t codebook[TURBO_STATES];
} turbo_decode_memory;

typedef struct {
    int8_t   codebook[TURBO_STATES];
    uint16_t target[2][QK_TURBO]; // by candidate, with 32768 added
    uint32_t costs[2][2][64];     // of paths that can go on to states with these low bits, before and after
    uint8_t  decisions[2][QK_TURBO][64]; // by value and low bits: the code of the best state that they follow
    uint8_t  states[QK_TURBO];
    float    errors[2];
} turbo_encode_memory;

typedef struct {
    float    tile[TURBO_KEYS*QK_TURBO];
    float    rows[TURBO_COLUMNS*TURBO_KEYS]; // columns of the other factor, then the product
    uint16_t codebook[TURBO_STATES];
} turbo_mul_mat_memory;

template <int M> struct turbo_attention_memory {
    float    tile[TURBO_KEYS*QK_TURBO]; // of keys, then of values
    float    rows[8*M*TURBO_CHANNELS(M)]; // of queries, then their scores, then their weights
    float    factors[M*64];               // of what was there before a tile: matrices that are diagonal
    uint16_t codebook_k[TURBO_STATES], codebook_v[TURBO_STATES];
    uint32_t seen_by[2][4];               // keys of a tile, as bits, by simdgroup
};
