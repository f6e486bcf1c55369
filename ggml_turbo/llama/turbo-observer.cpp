#include "llama/turbo-observer.h"

#include "llama-context.h"
#include "turbo-centers.h"
#include "turbo-rope.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <vector>

struct turbo_observer {
    turbo_attention_callback callback;
    void *                   user_data;

    std::map<int, std::vector<float>> keys; // of the batch that is being computed, by layer
    std::vector<float> q;
    std::vector<float> mask;
};

// The layer of a tensor that is a cache of keys, or a view or copy of one; -1 of others.
static int layer_of_keys(const ggml_tensor * t) {
    for (; t != nullptr; t = t->view_src ? t->view_src : t->src[0]) {
        int layer = -1;
        if (sscanf(t->name, "cache_k_l%d", &layer) == 1 && !t->view_src) {
            return layer;
        }
    }
    return -1;
}

static bool stores_keys(const ggml_tensor * node) {
    return node->op == GGML_OP_SET_ROWS && node->src[0]->type == GGML_TYPE_F32 && layer_of_keys(node) >= 0;
}

// The bytes of a tensor from its first element to its last, wherever it is.
static std::vector<uint8_t> bytes_of(const ggml_tensor * t) {
    std::vector<uint8_t> bytes(ggml_nbytes(t));
    ggml_backend_tensor_get(t, bytes.data(), 0, bytes.size());
    return bytes;
}

static bool observe(turbo_observer & observer, const ggml_tensor * node) {
    const ggml_tensor * q    = node->src[0]; // [head size, tokens, heads]
    const ggml_tensor * mask = node->src[3]; // [keys, tokens], F16
    const int layer = layer_of_keys(node->src[1]);
    const auto keys = observer.keys.find(layer);
    if (keys == observer.keys.end() || q->type != GGML_TYPE_F32 || !mask || mask->type != GGML_TYPE_F16) {
        return true;
    }
    const int64_t head_size = q->ne[0], n_tokens = q->ne[1], n_head = q->ne[2];

    const auto q_bytes = bytes_of(q);
    observer.q.resize(ggml_nelements(q));
    for (int64_t it = 0; it < n_tokens; ++it) {
        for (int64_t ih = 0; ih < n_head; ++ih) {
            memcpy(&observer.q[(it*n_head + ih)*head_size], &q_bytes[it*q->nb[1] + ih*q->nb[2]], head_size*sizeof(float));
        }
    }
    const auto mask_bytes = bytes_of(mask);
    observer.mask.resize(n_tokens*n_tokens);
    for (int64_t it = 0; it < n_tokens; ++it) { // the batch's tokens are in the first cells, in order
        for (int64_t ik = 0; ik < n_tokens; ++ik) {
            ggml_fp16_t seen;
            memcpy(&seen, &mask_bytes[it*mask->nb[1] + ik*mask->nb[0]], sizeof(seen));
            observer.mask[it*n_tokens + ik] = ggml_fp16_to_fp32(seen) == 0.0f ? 0.0f : -INFINITY;
        }
    }
    float params[3]; // scale, ALiBi's largest bias, soft cap
    memcpy(params, node->op_params, sizeof(params));

    turbo_attention attention;
    attention.layer     = layer;
    attention.n_tokens  = n_tokens;
    attention.n_head    = n_head;
    attention.n_head_kv = keys->second.size()/(n_tokens*head_size);
    attention.head_size = head_size;
    attention.scale     = params[0];
    attention.soft_cap  = params[2];
    attention.sinks     = node->src[4] != nullptr;
    attention.q         = observer.q.data();
    attention.k         = keys->second.data();
    attention.mask      = observer.mask.data();
    return observer.callback(&attention, observer.user_data);
}

turbo_observer * turbo_observer_new(turbo_attention_callback callback, void * user_data) {
    return new turbo_observer { callback, user_data, {}, {}, {} };
}

void turbo_observer_free(turbo_observer * observer) {
    delete observer;
}

bool turbo_observer_eval(ggml_tensor * node, bool ask, void * user_data) {
    auto & observer = *static_cast<turbo_observer *>(user_data);
    if (ask) {
        return node->op == GGML_OP_FLASH_ATTN_EXT || stores_keys(node);
    }
    if (node->op == GGML_OP_FLASH_ATTN_EXT) {
        return observe(observer, node);
    }
    const ggml_tensor * k = node->src[0]; // [channels, tokens], a part of the fused projection in some models
    const auto bytes = bytes_of(k);
    auto & keys = observer.keys[layer_of_keys(node)];
    keys.resize(ggml_nelements(k));
    for (int64_t it = 0; it < k->ne[1]; ++it) {
        memcpy(&keys[it*k->ne[0]], &bytes[it*k->nb[1]], k->ne[0]*sizeof(float));
    }
    return true;
}

void turbo_get_rotary(const llama_context * ctx, int32_t layer, turbo_rotary * rotary) {
    const llama_turbo_rope rope = llama_turbo_rope::of(ctx->get_model(), ctx->get_cparams(), layer);
    *rotary = { 0, rope.is_neox, llama_turbo_tiles::SIZE, {} };
    if (rope.angles.size() <= TURBO_MAX_PAIRS) {
        rotary->n_pairs = rope.angles.size();
        std::copy(rope.angles.begin(), rope.angles.end(), rotary->angles);
    }
}
