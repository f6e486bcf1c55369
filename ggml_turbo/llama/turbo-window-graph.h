#pragma once

// Attention with a recent window, as a part of llama.cpp's graphs.

#include "turbo-centers.h"
#include "turbo-kv.h"

#include "llama-graph.h"

#include <map>

// The inputs of all layers that have a cache in common.
class llm_graph_input_turbo_window : public llm_graph_input_i {
public:
    // batch: of the cache, is_swa: which of the two that a model with sliding windows has. kq_mask: of the cache, F16 [keys,
    // queries, 1, streams]. centers: of the cache in this graph; null if no centre turns.
    llm_graph_input_turbo_window(
        ggml_context * ctx, const llama_kv_cache_context * batch, bool is_swa, const ggml_tensor * kq_mask, int64_t n_tokens,
        llm_graph_input_turbo_batch_centers * centers);

    void set_input(const llama_ubatch * ubatch) override;
    bool can_reuse(const llm_graph_params & params) override;

    const bool  is_swa;
    ggml_tensor * window_mask, * columns; // as attention takes them
    ggml_tensor * rows;                   // I64 [tokens]: where the ring keeps them

    // Keys and values of the batch.
    struct own_tokens {
        ggml_tensor * k, * v;
        uint32_t      users; // layers of the model that share them and have not attended to them yet
    };
    std::map<uint32_t, own_tokens> own; // by the cache's index of a layer

private:
    const llama_kv_cache_context * batch; // of the batch at hand: it lives no longer than that, the graph does
    const ggml_tensor *            kq_mask;
    llm_graph_input_turbo_batch_centers * centers;
};
