#pragma once

// Centres of keys that turn with the position (turbo-calibration.h), as inputs of llama.cpp's graphs.

#include "turbo-rope.h"

#include "llama-graph.h"

#include <map>
#include <memory>
#include <tuple>
#include <vector>

class  llama_kv_cache;
class  llama_kv_cache_context;
class  llama_turbo_keys;

// The tiles that positions fall into, in order and each once. A tile's number is that of its positions divided by SIZE.
class llama_turbo_tiles {
public:
    static const llama_pos SIZE = 128;

    void add(llama_pos pos); // any number of times, before sort
    void sort();

    size_t size() const { return numbers.size(); }
    int32_t operator[](size_t index) const { return numbers[index]; }

    // The index of a position's tile; 0 for those of no tile, whose keys nobody sees.
    int32_t index_of(llama_pos pos);

private:
    std::vector<int32_t> numbers;
    int32_t              last_number = -1, last_index = 0; // positions come in runs
};

// How a pair of channels turns, averaged over a tile from its first position on: what is left of it, and how far it is
// turned, as a complex number.
struct llama_turbo_mean_turn {
    double real, imaginary;

    explicit llama_turbo_mean_turn(double angle);
};

// The inputs of all layers that have a cache in common: for each way in which centres turn, the basis of each tile in use
// (llama_turbo_rope::basis), [2*head size, tiles].
class llm_graph_input_turbo_centers : public llm_graph_input_i {
public:
    // keys: of the cache.
    llm_graph_input_turbo_centers(ggml_context * ctx, std::shared_ptr<const llama_turbo_keys> keys, size_t n_tiles);

    // Those of keys with n_head heads, [head size, heads, keys] each; tiles: I32 [keys].
    struct basis {
        ggml_tensor * cosines, * sines;
    };
    const basis & of(ggml_context * ctx, size_t rope, ggml_tensor * tiles, int64_t n_head);
    ggml_tensor * all(size_t rope) const { return bases[rope]; }

protected:
    // Sets the bases.
    void set(const llama_turbo_tiles & in_use);

    size_t n_tiles() const;

private:
    std::shared_ptr<const llama_turbo_keys>             keys;
    std::vector<ggml_tensor *>                          bases; // by rope
    std::map<std::tuple<size_t, ggml_tensor *, int64_t>, basis> made; // by rope, tiles and heads: the result of `of`
    std::vector<std::map<int32_t, std::vector<float>>> known; // by rope and number of a tile
};

// Those of attention in a batch.
class llm_graph_input_turbo_batch_centers : public llm_graph_input_turbo_centers {
public:
    llm_graph_input_turbo_batch_centers(ggml_context * ctx, const llama_kv_cache_context * batch, bool is_swa, int64_t n_tokens);

    // That of a graph; null if it has none yet.
    static llm_graph_input_turbo_batch_centers * find(llm_graph_result * res, bool is_swa);

    void set_input(const llama_ubatch * ubatch) override;
    bool can_reuse(const llm_graph_params & params) override;

    const bool    is_swa;
    ggml_tensor * token_tiles; // I32 [tokens]

    std::map<int32_t, ggml_tensor *> biases; // by layer: llama_turbo_keys::q_centers

    llama_turbo_tiles tiles; // of this batch, found when its graph is built or taken again

private:
    const llama_kv_cache_context * batch; // of the batch at hand: it lives no longer than that, the graph does
};

// Those of a context shift: of all cells, as they were stored and as they will be.
class llm_graph_input_turbo_shift_centers : public llm_graph_input_turbo_centers {
public:
    llm_graph_input_turbo_shift_centers(ggml_context * ctx, const llama_kv_cache * cache);

    void set_input(const llama_ubatch * ubatch) override;

    ggml_tensor * old_tiles, * new_tiles; // I32 [cells of all streams]

private:
    const llama_kv_cache * cache;
};
