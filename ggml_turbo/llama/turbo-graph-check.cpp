// Whether every layer of a graph whose keys are stored calibrated has its queries calibrated, too, and whether every
// layer of a cache with a recent window attends to it. The graph itself is looked at, so an architecture that reads or
// writes a cache in a way of its own is noticed, whatever its name is.

#include "llama-impl.h"
#include "ops/turbo-window.h"
#include "turbo-kv.h"

#include <algorithm>
#include <stdexcept>

// The tensor whose memory t is, seen through views and through nodes that only copy.
static const ggml_tensor * memory_of(const ggml_tensor * t) {
    while (!t->view_src && (t->op == GGML_OP_CPY || t->op == GGML_OP_CONT || t->op == GGML_OP_DUP)) {
        t = t->src[0];
    }
    return t->view_src ? t->view_src : t;
}

static bool only_rearranges(const ggml_tensor * node) {
    switch (node->op) {
        case GGML_OP_VIEW:
        case GGML_OP_RESHAPE:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
        case GGML_OP_CONT:
        case GGML_OP_CPY:
        case GGML_OP_DUP:
            return true;
        default:
            return false;
    }
}

// Whether t is x multiplied by one of these scales, perhaps rotated, rearranged or centred since.
static bool is_scaled(const ggml_tensor * t, const std::vector<const ggml_tensor *> & scales) {
    while (t) {
        switch (t->op) {
            case GGML_OP_MUL:
                return std::find(scales.begin(), scales.end(), t->src[1]) != scales.end();
            case GGML_OP_MUL_MAT: // by a rotation; a projection leads to a norm, which is scaled by none of these
                t = t->src[1];
                break;
            case GGML_OP_CONCAT: // with what is added to scores
                t = t->src[0];
                break;
            default:
                if (!only_rearranges(t)) {
                    return false;
                }
                t = t->src[0];
        }
    }
    return false;
}

template <typename predicate>
static bool any_source(const ggml_tensor * node, predicate && holds) {
    return std::any_of(node->src, node->src + GGML_MAX_SRC, [&](const ggml_tensor * source) {
        return source && holds(source);
    });
}

bool llama_turbo_check_graph(ggml_cgraph * graph) {
    const auto stores = llama_turbo_kv::key_tensors();
    if (stores.empty()) {
        return true;
    }
    std::map<const llama_turbo_kv *, llama_turbo_kv::attended> found;
    const auto store_of = [&](const ggml_tensor * t) {
        const auto it = stores.find(memory_of(t));
        return it != stores.end() ? &it->second : nullptr;
    };
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        const ggml_tensor * node = ggml_graph_node(graph, i);
        if (only_rearranges(node)) {
            continue;
        }
        if (node->op == GGML_OP_SET_ROWS) {
            const auto * store = store_of(node);
            if (store && store->scale && !is_scaled(node->src[0], { store->scale })) {
                found[store->turbo].uncalibrated.insert(store->layer);
            }
            continue;
        }
        for (const ggml_tensor * source : node->src) {
            const auto * store = source ? store_of(source) : nullptr;
            if (!store) {
                continue;
            }
            auto & of_cache = found[store->turbo];
            of_cache.layers.insert(store->layer);
            const auto is_query = [&](const ggml_tensor * t) { return is_scaled(t, store->q_scales); };
            const bool knows_centers = turbo_is_window_attention(node) && turbo_window_biases(node) > 0;
            if (store->scale && !(any_source(node, is_query) && (knows_centers || !store->turns))) {
                of_cache.uncalibrated.insert(store->layer);
            }
            if (store->ring && !any_source(node, [&](const ggml_tensor * t) { return memory_of(t) == store->ring; })) {
                of_cache.without_window.insert(store->layer);
            }
        }
    }
    return std::all_of(found.begin(), found.end(), [](const auto & of_cache) {
        return of_cache.first->accepts(of_cache.second);
    });
}
