#pragma once

// Attention with a recent window, as a part of llama.cpp's graphs.

#include "turbo-recent-window.h"

#include "llama-graph.h"

#include <functional>
#include <map>
#include <utility>

class llama_kv_cache_context;

// The inputs of all layers that have a cache in common.
class llm_graph_input_turbo_window : public llm_graph_input_i {
public:
    // The cache of the batch at hand: graphs are used again with other batches.
    using cache_of_batch = std::function<const llama_kv_cache_context *()>;

    // kq_mask: of the cache, F16 [keys, queries, 1, streams].
    llm_graph_input_turbo_window(ggml_context * ctx, cache_of_batch cache, const ggml_tensor * kq_mask, int64_t n_tokens);

    void set_input(const llama_ubatch * ubatch) override;
    bool can_reuse(const llm_graph_params &) override { return true; } // the input of the cache itself has the same sizes

    ggml_tensor * window_mask, * columns; // as attention takes them
    ggml_tensor * rows;                   // I64 [tokens]: where the ring keeps them

    // By the cache's index of a layer: keys and values of the batch, for layers that share them.
    std::map<uint32_t, std::pair<ggml_tensor *, ggml_tensor *>> own;

private:
    cache_of_batch      cache;
    const ggml_tensor * kq_mask;
};

// What llm_graph_context::build_attn_mha makes of these, with the window; null if the cache has none, or if layer il reads
// keys that are not of this graph. k, v: of the cache; k_cur, v_cur: of the batch, null in layers that share another's.
ggml_tensor * llama_turbo_attend(
    ggml_context * ctx, ggml_cgraph * gf, llm_graph_result * res, llm_graph_input_turbo_window *& input,
    const llm_graph_input_turbo_window::cache_of_batch & cache, const llama_hparams & hparams, ggml_tensor * q, ggml_tensor * k,
    ggml_tensor * v, ggml_tensor * k_cur, ggml_tensor * v_cur, ggml_tensor * kq_mask, ggml_tensor * sinks, float kq_scale, int il);
