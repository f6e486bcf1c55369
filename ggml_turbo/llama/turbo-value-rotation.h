#pragma once

// Models whose value rotation `turboquant-gguf convert` has folded into the weights: docs/value-rotation.md.

#include "llama-impl.h"

#include <stdexcept>
#include <string>
#include <unordered_map>

static const char * const LLAMA_TURBO_VALUES_VERSION = "turboquant.values.version";

static inline bool llama_turbo_values_rotated(const std::unordered_map<std::string, std::string> & gguf_kv) {
    return gguf_kv.count(LLAMA_TURBO_VALUES_VERSION) > 0;
}

// Throws if the file says that its values were rotated in a way this build does not know.
static inline void llama_turbo_check_values(const std::unordered_map<std::string, std::string> & gguf_kv) {
    const auto it = gguf_kv.find(LLAMA_TURBO_VALUES_VERSION);
    if (it == gguf_kv.end()) {
        return;
    }
    if (it->second != "1") {
        throw std::runtime_error(format("%s is %s, and this build knows version 1 only: update turboquant-gguf, or convert the model again",
            LLAMA_TURBO_VALUES_VERSION, it->second.c_str()));
    }
    LLAMA_LOG_INFO("%s: the weights rotate the values: a quantized value cache needs no rotation of its own\n", __func__);
}

// Throws if an adapter changes a tensor that the rotation has changed: it was trained on the original one.
static inline void llama_turbo_check_lora(const std::unordered_map<std::string, std::string> & gguf_kv, const std::string & tensor) {
    if (!llama_turbo_values_rotated(gguf_kv)) {
        return;
    }
    for (const char * rotated : { ".attn_v.", ".attn_qkv.", ".attn_output." }) {
        if (tensor.find(rotated) != std::string::npos) {
            throw std::runtime_error(format("the adapter changes %s, which this model holds rotated: merge the adapter into the checkpoint "
                "before converting it, or convert with --rotate none", tensor.c_str()));
        }
    }
}
