#pragma once

// Hands out the queries and keys that attention works with, layer by layer, while a model runs. Plain C, for the Python
// package (python/turboquant_gguf/weights/calibration.py).

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

// What attention in one layer got: of one batch that fills an empty cache, of one sequence, not rotated. All float32.
struct turbo_attention {
    int32_t layer;     // whose cache holds the keys
    int32_t n_tokens;
    int32_t n_head;
    int32_t n_head_kv;
    int32_t head_size;
    float   scale;     // of the scores
    float   soft_cap;  // 0: none
    bool    sinks;
    const float * q;    // [tokens, heads, head size]
    const float * k;    // [tokens, KV heads, head size]
    const float * mask; // [tokens of queries, tokens of keys]: 0 where a query sees a key, -inf where it does not
};

// False stops the model.
typedef bool (*turbo_attention_callback)(const struct turbo_attention * attention, void * user_data);

struct turbo_observer;

LLAMA_API struct turbo_observer * turbo_observer_new (turbo_attention_callback callback, void * user_data);
LLAMA_API void                    turbo_observer_free(struct turbo_observer * observer);

// For llama_context_params: cb_eval, with the observer as cb_eval_user_data. Flash attention must be on.
LLAMA_API bool turbo_observer_eval(struct ggml_tensor * node, bool ask, void * observer);

// How the keys of a layer turn with their position (turbo-rope.h). Channels of the first n_pairs pairs turn, each pair by
// its angle for each position.
enum { TURBO_MAX_PAIRS = 512 };
struct turbo_rotary {
    int32_t n_pairs; // 0: nothing turns
    bool    is_neox; // pairs are (i, i + n_pairs), not (2i, 2i + 1)
    int32_t tile;    // positions whose keys have one centre
    double  angles[TURBO_MAX_PAIRS];
};

LLAMA_API void turbo_get_rotary(const struct llama_context * ctx, int32_t layer, struct turbo_rotary * rotary);

#ifdef __cplusplus
}
#endif
