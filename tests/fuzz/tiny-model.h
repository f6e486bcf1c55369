#pragma once

// A random Llama of two layers and one KV head of 64 values, made in memory: its metadata and its weights.

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "gguf.h"
#include "llama-cpp.h"

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "fuzz.h"

constexpr int32_t TINY_LAYERS = 2, TINY_HEADS = 2, TINY_HEAD_SIZE = 64, TINY_VOCABULARY = 32;

inline void tiny_metadata(gguf_context * to) {
    gguf_set_val_str(to, "general.architecture", "llama");
    gguf_set_val_str(to, "tokenizer.ggml.model", "none");
    const std::pair<const char *, uint32_t> numbers[] = {
        { "vocab_size", TINY_VOCABULARY }, { "context_length", 512 }, { "embedding_length", TINY_HEADS*TINY_HEAD_SIZE },
        { "block_count", TINY_LAYERS }, { "feed_forward_length", 64 }, { "attention.head_count", TINY_HEADS },
        { "attention.head_count_kv", 1 }, { "rope.dimension_count", TINY_HEAD_SIZE },
    };
    for (const auto & [key, value] : numbers) {
        gguf_set_val_u32(to, (std::string("llama.") + key).c_str(), value);
    }
    gguf_set_val_f32(to, "llama.attention.layer_norm_rms_epsilon", 1e-5f);
}

// A calibration that fits: scales of 1/2 and 2, of which the geometric mean is 1. turned: of version 2, with centres that
// turn with the position.
inline void tiny_calibration(gguf_context * to, bool turned = true) {
    const std::vector<int32_t> sizes(TINY_LAYERS, TINY_HEAD_SIZE);
    std::vector<float> center, scale;
    for (int32_t i = 0; i < TINY_LAYERS*TINY_HEAD_SIZE; ++i) {
        center.push_back((float) (i % 5) - 2);
        scale.push_back(i % 2 ? 2.0f : 0.5f);
    }
    gguf_set_val_u32(to, "turboquant.keys.version", turned ? 2 : 1);
    gguf_set_val_u32(to, "turboquant.keys.context", 1 << 20);
    if (turned) { // all channels
        gguf_set_arr_data(to, "turboquant.keys.turned", GGUF_TYPE_INT32, sizes.data(), sizes.size());
    }
    gguf_set_arr_data(to, "turboquant.keys.sizes",  GGUF_TYPE_INT32,   sizes.data(),  sizes.size());
    gguf_set_arr_data(to, "turboquant.keys.center", GGUF_TYPE_FLOAT32, center.data(), center.size());
    gguf_set_arr_data(to, "turboquant.keys.scale",  GGUF_TYPE_FLOAT32, scale.data(),  scale.size());
}

// Null if llama.cpp refuses the metadata.
inline llama_model_ptr tiny_model(gguf_context * metadata) {
    const auto set_weights = [](ggml_tensor * tensor, void *) {
        uint64_t sum = 0;
        for (const char * c = tensor->name; *c; ++c) {
            sum = 31*sum + *c;
        }
        fuzz_random random(7, sum);
        const float size = tensor->ne[1] > 1 ? 1/std::sqrt((float) tensor->ne[0]) : 0.0f;
        std::vector<float> weights(ggml_nelements(tensor));
        for (float & w : weights) {
            w = size > 0 ? random.gaussian()*size : 1.0f;
        }
        ggml_backend_tensor_set(tensor, weights.data(), 0, ggml_nbytes(tensor));
    };
    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers = 0;
    return llama_model_ptr(llama_model_init_from_user(metadata, set_weights, nullptr, params));
}
