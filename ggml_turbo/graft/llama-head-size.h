#pragma once

// Refuses turbo caches for models whose head size the turbo block does not divide, and says what works instead.

#include "ggml-turbo.h"
#include "llama-hparams.h"
#include "llama-impl.h"

#include <string>

static bool llama_is_turbo(ggml_type type) {
    return type == GGML_TYPE_TURBO2 || type == GGML_TYPE_TURBO3 || type == GGML_TYPE_TURBO4;
}

// The stock cache types whose block divides the head size, as --cache-type-k and -v name them.
static std::string llama_cache_types_for_head_size(uint32_t head_size) {
    std::string names;
    for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q5_1, GGML_TYPE_Q5_0,
                            GGML_TYPE_IQ4_NL, GGML_TYPE_Q4_1, GGML_TYPE_Q4_0, GGML_TYPE_F32 }) {
        if (head_size % ggml_blck_size(type) == 0) {
            names += std::string(names.empty() ? "" : ", ") + ggml_type_name(type);
        }
    }
    return names;
}

static bool llama_turbo_divides_head(const char * what, ggml_type type, uint32_t head_size, uint32_t il) {
    if (!llama_is_turbo(type) || head_size % QK_TURBO == 0) {
        return true;
    }
    LLAMA_LOG_ERROR("%s: the %s cache cannot be %s: its blocks hold %d values of one head, and layer %u of this model has a %s head size of %u. "
        "Cache types that work for it: %s\n",
        __func__, what, ggml_type_name(type), QK_TURBO, il, what, head_size, llama_cache_types_for_head_size(head_size).c_str());
    return false;
}

static bool llama_turbo_divides_heads(const llama_hparams & hparams, ggml_type type_k, ggml_type type_v) {
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (!llama_turbo_divides_head("K", type_k, hparams.n_embd_head_k(il), il) ||
            !llama_turbo_divides_head("V", type_v, hparams.n_embd_head_v(il), il)) {
            return false;
        }
    }
    return true;
}
