#pragma once

// Attention over a quantized cache of which some keys and values are at hand in full precision, too: those of the first
// tokens and of the last ones before a batch, in a ring, and those of the batch itself (docs/recent-window.md).
//
// One softmax goes over three parts, each with keys, values and a mask. A key that a query sees in the ring or in the batch
// is not read from the cache for that query, so that it counts once.
//
// Keys may be of several tiles, and each query add a number of its own to the products with all keys of a tile (docs/
// calibration.md): then the numbers follow the channels of the query, and the tiles of the keys follow the columns.

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

// The sources of the node, which has as many as a node can have. Keys and values are as GGML_OP_FLASH_ATTN_EXT has them:
// F32, F16 or a quantized type, [head size, tokens, KV heads, streams].
enum turbo_window_source {
    TURBO_WINDOW_Q,       // F32 [head size of K, then a number for each tile; queries, heads, streams]
    TURBO_WINDOW_K,
    TURBO_WINDOW_V,
    TURBO_WINDOW_MASK,    // F16 [keys of the cache, queries, 1, streams]
    TURBO_WINDOW_SINKS,   // F32 [heads], or NULL
    TURBO_WINDOW_RING,    // F16 [keys of all KV heads, then their values; slots, 1, streams]
    TURBO_WINDOW_NEW_K,
    TURBO_WINDOW_NEW_V,
    TURBO_WINDOW_MASK_W,  // F16 [slots of the ring, then tokens of the batch; queries, 1, streams]
    TURBO_WINDOW_COLUMNS, // I32 [keys of the cache, 1, 1, streams]: in MASK_W, of the same key; -1 if it is not there. With
                          // tiles, those of the keys follow: of the cache, of the ring, of the batch
    TURBO_WINDOW_SOURCES,
};

// The node: F32 [head size of V, heads, queries, streams]. A custom operator, which back ends that do not know it refuse;
// wherever no kernel claims it, the CPU back end computes it by the reference below.
GGML_API struct ggml_tensor * turbo_window_attention(
    struct ggml_context * ctx, struct ggml_tensor * const sources[TURBO_WINDOW_SOURCES], float scale, float max_bias, float softcap);

GGML_API bool turbo_is_window_attention(const struct ggml_tensor * op);

// How many numbers each query adds to products; 0: there are no tiles.
GGML_API int64_t turbo_window_biases(const struct ggml_tensor * op);

// Keys and values of a node's ring, as those of the cache are.
GGML_API void turbo_window_ring(const struct ggml_tensor * op, struct ggml_tensor * k, struct ggml_tensor * v);

// What a query head multiplies the mask with: ALiBi (arXiv 2108.12409); 1 without.
GGML_API float turbo_alibi_slope(int64_t head, int64_t n_heads, float max_bias);

// scale, max_bias and softcap of a node, as in GGML_OP_FLASH_ATTN_EXT.
GGML_API const float * turbo_window_params(const struct ggml_tensor * op);

#ifdef __cplusplus
}
#endif
