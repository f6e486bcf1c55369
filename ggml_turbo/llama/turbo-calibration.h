#pragma once

// Calibrated key caches: keys are stored centred and scaled channel by channel, queries make up for it, and every score
// differs from what it was by a constant of its query, which softmax does not see (docs/calibration.md):
//
//     stored key   k' = s (k - m)          query   q' = q / s
//
// m and s are vectors over the channels of each KV head of a layer, in the file's metadata. They apply after RoPE and
// before the Hadamard rotation, for quantized keys.

#include "llama.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

struct gguf_context;
struct llama_model;

// What a file says. Immutable; shared by the model and its caches.
struct llama_turbo_calibration {
    struct layer {
        std::vector<float> center; // [head size, KV heads]; empty: zero
        std::vector<float> scale;  // [head size, KV heads]; empty: this layer is not calibrated
    };

    std::vector<layer> layers;
    uint64_t           hash    = 0; // of the vectors; odd
    uint32_t           context = 0; // the longest it is good for, in tokens

    // From the metadata of a model; null if there is none. Throws if it is damaged, of a version that this build does not
    // know, or not of this model.
    static std::shared_ptr<const llama_turbo_calibration> load(const gguf_context * metadata, const llama_model & model);
};

// While one lives, the caches that its thread makes are of a context of n_ctx tokens a sequence. A cache alone cannot tell:
// that of a sliding window has fewer cells than its keys have positions.
class llama_turbo_context {
public:
    explicit llama_turbo_context(uint32_t n_ctx);
    ~llama_turbo_context();
};

// The vectors of a cache's layers, on the devices where those layers are.
class llama_turbo_keys {
public:
    // A layer's cache: whose keys it holds (another layer's, where layers share), and where it is.
    struct place {
        uint32_t                   owner;
        ggml_backend_buffer_type_t buft;
    };

    // Null if the model is not calibrated, keys of type_k are stored as they are, or the context is longer than what the
    // calibration was measured for, of which the log then warns; or as the context's settings say
    // (turbo-settings.h).
    static std::shared_ptr<llama_turbo_keys> make(const llama_model & model, ggml_type type_k, const std::map<uint32_t, place> & places);

    uint64_t hash() const { return calibration->hash; }

    // What the keys and the queries of a layer are multiplied by; null if it is not calibrated.
    const ggml_tensor * scale  (int32_t il) const;
    const ggml_tensor * q_scale(int32_t il) const;

    // Nodes of a graph. k: [head size, KV heads, tokens], q: [head size, heads, tokens], both F32.
    ggml_tensor * apply_k(ggml_context * ctx, ggml_tensor * k, int32_t il) const;
    ggml_tensor * apply_q(ggml_context * ctx, ggml_tensor * q, int32_t il) const;
    ggml_tensor * undo_k (ggml_context * ctx, ggml_tensor * k, int32_t il) const;

private:
    struct layer {
        ggml_tensor * center;  // null: zero
        ggml_tensor * scale;
        ggml_tensor * q_scale; // 1/s, repeated for the query heads of each group
    };

    std::shared_ptr<const llama_turbo_calibration> calibration;
    std::map<int32_t, layer>                       layers;
    std::map<ggml_backend_buffer_type_t, std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> bufs;
};
