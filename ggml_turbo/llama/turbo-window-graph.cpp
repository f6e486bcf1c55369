#include "turbo-window-graph.h"

#include "llama-cparams.h"
#include "llama-hparams.h"
#include "llama-kv-cache.h"
#include "ops/turbo-window.h"

#include <algorithm>

llm_graph_input_turbo_window::llm_graph_input_turbo_window(
        ggml_context * ctx, const llama_kv_cache_context * batch, bool is_swa, const ggml_tensor * kq_mask, int64_t n_tokens,
        llm_graph_input_turbo_batch_centers * centers)
    : is_swa(is_swa), batch(batch), kq_mask(kq_mask), centers(centers) {
    const int64_t n_queries = kq_mask->ne[1], n_streams = kq_mask->ne[3];
    const int64_t slots     = llama_turbo_kv::of(batch).window->slots();
    window_mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, slots + n_queries, n_queries, 1, n_streams);
    const int64_t n_tiles = centers ? kq_mask->ne[0] + window_mask->ne[0] : 0; // a tile for each key
    columns     = ggml_new_tensor_4d(ctx, GGML_TYPE_I32, kq_mask->ne[0] + n_tiles, 1, 1, n_streams);
    rows        = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_tokens);
    ggml_set_name(window_mask, "turbo_window_mask");
    ggml_set_name(columns,     "turbo_window_columns");
    ggml_set_name(rows,        "turbo_window_rows");
    for (ggml_tensor * t : { window_mask, columns, rows }) {
        ggml_set_input(t);
    }
}

void llm_graph_input_turbo_window::set_input(const llama_ubatch * ubatch) {
    const bool stores = std::all_of(own.begin(), own.end(), [](const auto & layer) { return layer.second.users == 0; });
    if (centers) {
        llama_turbo_kv::set_window_tiles(batch, *ubatch, kq_mask->ne[0], centers->tiles, columns);
    }
    // kq_mask and centers were set just before: inputs are set in the order they were added in
    llama_turbo_kv::set_window_inputs(batch, *ubatch, kq_mask, window_mask, columns, rows, stores);
}

bool llm_graph_input_turbo_window::can_reuse(const llm_graph_params & params) {
    batch = llama_turbo_kv::cache_of(params.mctx, is_swa);
    return batch != nullptr; // the input of the cache itself has the same sizes
}

// Keys, values or queries of a batch [head size, heads, tokens] as attention takes them: [head size, tokens, heads, streams].
static ggml_tensor * by_stream(ggml_context * ctx, ggml_tensor * x, int64_t n_streams) {
    const int64_t n = x->ne[2]/n_streams;
    return ggml_view_4d(ctx, x, x->ne[0], n, x->ne[1], n_streams, x->nb[2], x->nb[1], x->nb[2]*n, 0);
}

// The inputs that the graph has for this cache; null if it has none yet.
static llm_graph_input_turbo_window * inputs_of(llm_graph_result * res, bool is_swa) {
    for (const auto & input : res->inputs) {
        auto * found = dynamic_cast<llm_graph_input_turbo_window *>(input.get());
        if (found && found->is_swa == is_swa) {
            return found;
        }
    }
    return nullptr;
}

// Has a node computed by the back end whose memory a buffer is. The scheduler would leave attention to the back end of its
// neighbours, and copy the whole cache there for each batch.
static void compute_beside(ggml_backend_sched_t sched, ggml_tensor * node, ggml_backend_buffer_t buffer) {
    ggml_backend_dev_t device = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(buffer));
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        ggml_backend_t backend = ggml_backend_sched_get_backend(sched, i);
        if (ggml_backend_get_device(backend) == device) {
            ggml_backend_sched_set_tensor_backend(sched, node, backend);
            return;
        }
    }
}

ggml_tensor * llama_turbo_kv::attend(
        ggml_context * ctx, ggml_cgraph * gf, ggml_backend_sched_t sched, llm_graph_result * res, const llama_memory_context_i * memory,
        const llama_kv_cache_context * batch, const llama_hparams & hparams, const llama_cparams & cparams, ggml_tensor * q,
        ggml_tensor * k, ggml_tensor * v, ggml_tensor * k_cur, ggml_tensor * v_cur, ggml_tensor * bias, ggml_tensor * kq_mask,
        ggml_tensor * sinks, float kq_scale, int il) {
    const llama_turbo_window * window = of(batch).window.get();
    if (!window || of(batch).is_window_off || bias || cparams.training || kq_mask->type != GGML_TYPE_F16) {
        return nullptr;
    }
    const bool is_swa = cache_of(memory, false) != batch;
    if (cache_of(memory, is_swa) != batch) { // what this graph reads could not be found again for the next batch
        return nullptr;
    }
    const uint32_t layer = llama_turbo_kv::layer(batch, il);
    llm_graph_input_turbo_window * input = inputs_of(res, is_swa);
    if (!k_cur && !(input && input->own.count(layer))) {
        return nullptr;
    }
    auto * centers = llm_graph_input_turbo_batch_centers::find(res, is_swa);
    if (!input) {
        auto made = std::make_unique<llm_graph_input_turbo_window>(ctx, batch, is_swa, kq_mask, q->ne[2], centers);
        input = static_cast<llm_graph_input_turbo_window *>(res->add_input(std::move(made)));
    }
    if (k_cur) {
        input->own[layer] = { k_cur, v_cur, llama_turbo_kv::users(batch, layer) };
    }
    auto & own = input->own.at(layer);
    const int64_t  n_streams = k->ne[3];
    const uint32_t first     = llama_turbo_kv::first_stream(batch);

    if (centers && centers->biases.count(il)) { // queries bring along what they add to the scores of each tile's keys
        q = ggml_concat(ctx, q, centers->biases.at(il), 0);
    }
    ggml_tensor * sources[TURBO_WINDOW_SOURCES];
    sources[TURBO_WINDOW_Q]       = by_stream(ctx, q, n_streams);
    sources[TURBO_WINDOW_K]       = ggml_permute(ctx, k, 0, 2, 1, 3);
    sources[TURBO_WINDOW_V]       = ggml_permute(ctx, v, 0, 2, 1, 3);
    sources[TURBO_WINDOW_MASK]    = kq_mask;
    sources[TURBO_WINDOW_SINKS]   = sinks;
    sources[TURBO_WINDOW_RING]    = window->ring(ctx, layer, first, n_streams);
    sources[TURBO_WINDOW_NEW_K]   = by_stream(ctx, own.k, n_streams);
    sources[TURBO_WINDOW_NEW_V]   = by_stream(ctx, own.v, n_streams);
    sources[TURBO_WINDOW_MASK_W]  = input->window_mask;
    sources[TURBO_WINDOW_COLUMNS] = input->columns;
    ggml_tensor * attended = turbo_window_attention(
        ctx, sources, kq_scale, hparams.f_max_alibi_bias, hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f);
    compute_beside(sched, attended, window->memory(layer)->buffer);
    ggml_tensor * cur = ggml_reshape_2d(
        ctx, attended, attended->ne[0]*attended->ne[1], attended->ne[2]*attended->ne[3]);
    ggml_build_forward_expand(gf, cur);
    if (--own.users == 0) { // all that attend to the ring see it as it was before this batch
        ggml_build_forward_expand(gf, window->store_k(ctx, layer, own.k, input->rows));
        ggml_build_forward_expand(gf, window->store_v(ctx, layer, own.v, input->rows));
    }
    return cur;
}
