#pragma once

// Calibrated key caches: keys are stored centred and scaled channel by channel, and queries make up for it
// (docs/calibration.md):
//
//     stored key   k' = s (k - c)          query   q' = q / s          score   q k = q' k' + q c
//
// c and s are vectors over the channels of each KV head of a layer. They apply after RoPE and before the Hadamard rotation,
// for quantized keys. Where c is the same for all keys, so is q c, which softmax does not see. RoPE turns the mean of keys
// with their position, and then c is a function of the position, in tiles of some: c(p) is the mean of R_t m for all
// positions t of p's tile, with m the mean of keys before RoPE. It is a product of a matrix of the layer and a vector of the
// tile, the cosines and sines of its angles, so q c takes a product for each query and a dot product for each tile.

#include "llama.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

class  llm_graph_input_turbo_centers;
struct gguf_context;
struct llama_cparams;
struct llama_model;
struct llama_turbo_rope;

// What a file says. Immutable; shared by the model and its caches.
struct llama_turbo_calibration {
    struct layer {
        std::vector<float> center;       // [head size, KV heads]; empty: zero
        std::vector<float> scale;        // [head size, KV heads]; empty: this layer is not calibrated
        uint32_t           n_turned = 0; // channels of each head in which the centre turns with the position
    };

    std::vector<layer> layers;
    uint64_t           hash    = 0; // of the vectors; odd
    uint32_t           context = 0; // the longest it is good for, in tokens

    // From the metadata of a model; null if there is none. Throws if it is damaged, of a version that this build does not
    // know, or not of this model.
    static std::shared_ptr<const llama_turbo_calibration> load(const gguf_context * metadata, const llama_model & model);
};

// While one lives, the caches that its thread makes are of a context with these parameters. A cache alone cannot tell: that
// of a sliding window has fewer cells than its keys have positions.
class llama_turbo_context {
public:
    explicit llama_turbo_context(const llama_cparams & cparams);
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
    // (turbo-settings.h). no_turning: why no centre can turn with the position here; empty if it can.
    static std::shared_ptr<llama_turbo_keys> make(
        const llama_model & model, ggml_type type_k, const std::map<uint32_t, place> & places, std::string no_turning);

    llama_turbo_keys();
    ~llama_turbo_keys();

    uint64_t hash() const { return calibration->hash; }

    // What the keys and the queries of a layer are multiplied by; null if it is not calibrated.
    const ggml_tensor * scale  (int32_t il) const;
    const ggml_tensor * q_scale(int32_t il) const;

    // Whether the centre of a layer, or of any, turns with the position.
    bool turns(int32_t il) const;
    bool turns() const { return !ropes.empty(); }

    // The different ways in which centres turn.
    const std::vector<llama_turbo_rope> & all_ropes() const { return ropes; }

    // Nodes of a graph. k: [head size, KV heads, tokens], q: [head size, heads, tokens], both F32. centers: the inputs of
    // the graph, null if no centre turns; tiles: of the keys, an index into them for each.
    ggml_tensor * apply_k(ggml_context * ctx, ggml_tensor * k, int32_t il, llm_graph_input_turbo_centers * centers, ggml_tensor * tiles) const;
    ggml_tensor * undo_k (ggml_context * ctx, ggml_tensor * k, int32_t il, llm_graph_input_turbo_centers * centers, ggml_tensor * tiles) const;
    ggml_tensor * apply_q(ggml_context * ctx, ggml_tensor * q, int32_t il) const;

    // The dot products of queries, as they are before apply_q, with the centres of all tiles: [tiles, heads, tokens].
    ggml_tensor * q_centers(ggml_context * ctx, ggml_tensor * q, int32_t il, const llm_graph_input_turbo_centers & centers) const;

private:
    struct layer {
        ggml_tensor * center;  // that is the same for all keys; null: there is none
        ggml_tensor * scale;
        ggml_tensor * q_scale; // 1/s, repeated for the query heads of each group
        ggml_tensor * of_cosines, * of_sines; // what those of a tile's angles are multiplied by, channel by channel: the sum of
                                              // both is the centre. Null: it does not turn
        ggml_tensor * q_turned; // [head size, 2, heads]: both, repeated for the query heads of each group
        size_t        rope;    // of all_ropes
    };

    // k plus or less the centre.
    template <typename F>
    ggml_tensor * move(
        ggml_context * ctx, const layer & l, ggml_tensor * k, llm_graph_input_turbo_centers * centers, ggml_tensor * tiles, F && add) const;

    std::shared_ptr<const llama_turbo_calibration> calibration;
    std::vector<llama_turbo_rope>                  ropes;
    std::map<int32_t, layer>                       layers;
    std::map<ggml_backend_buffer_type_t, std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> bufs;
};
