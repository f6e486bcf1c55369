#include "turbo-centers.h"

#include "turbo-kv.h"

#include "llama-kv-cache.h"

#include <algorithm>
#include <cmath>
#include <complex>

void llama_turbo_tiles::add(llama_pos pos) {
    if (pos/SIZE != last_number) {
        last_number = pos/SIZE;
        numbers.push_back(last_number);
    }
}

void llama_turbo_tiles::sort() {
    std::sort(numbers.begin(), numbers.end());
    numbers.erase(std::unique(numbers.begin(), numbers.end()), numbers.end());
    last_number = -1;
}

int32_t llama_turbo_tiles::index_of(llama_pos pos) {
    if (pos/SIZE != last_number) {
        const auto found = std::lower_bound(numbers.begin(), numbers.end(), pos/SIZE);
        last_number = pos/SIZE;
        last_index  = found != numbers.end() && *found == last_number ? found - numbers.begin() : 0;
    }
    return last_index;
}

llama_turbo_mean_turn::llama_turbo_mean_turn(double angle) {
    std::complex<double> sum = 0.0;
    for (int i = 0; i < llama_turbo_tiles::SIZE; ++i) {
        sum += std::polar(1.0, angle*i);
    }
    real      = sum.real()/llama_turbo_tiles::SIZE;
    imaginary = sum.imag()/llama_turbo_tiles::SIZE;
}

// ---- the inputs ----

llm_graph_input_turbo_centers::llm_graph_input_turbo_centers(
        ggml_context * ctx, std::shared_ptr<const llama_turbo_keys> keys, size_t n_tiles)
    : keys(std::move(keys)), known(this->keys->all_ropes().size()) {
    for (const llama_turbo_rope & rope : this->keys->all_ropes()) {
        bases.push_back(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 2*rope.n_embd, n_tiles));
        ggml_set_input(bases.back());
    }
}

size_t llm_graph_input_turbo_centers::n_tiles() const {
    return bases[0]->ne[1];
}

const llm_graph_input_turbo_centers::basis & llm_graph_input_turbo_centers::of(
        ggml_context * ctx, size_t rope, ggml_tensor * tiles, int64_t n_head) {
    basis & result = made[{ rope, tiles, n_head }];
    if (!result.cosines) {
        ggml_tensor * rows = ggml_get_rows(ctx, bases[rope], tiles);
        const int64_t n_embd = rows->ne[0]/2, n_keys = rows->ne[1];
        const auto for_heads = [&](size_t offset) {
            ggml_tensor * part = ggml_view_3d(ctx, rows, n_embd, 1, n_keys, rows->nb[1], rows->nb[1], offset);
            return ggml_repeat_4d(ctx, part, n_embd, n_head, n_keys, 1);
        };
        result = { for_heads(0), for_heads(n_embd*rows->nb[0]) };
    }
    return result;
}

void llm_graph_input_turbo_centers::set(const llama_turbo_tiles & in_use) {
    GGML_ASSERT(in_use.size() <= n_tiles());
    for (size_t i = 0; i < bases.size(); ++i) {
        if (!bases[i]->buffer) { // nothing in this graph reads it
            continue;
        }
        const llama_turbo_rope & rope = keys->all_ropes()[i];
        std::vector<float> basis(ggml_nelements(bases[i]), 0.0f);
        for (size_t tile = 0; tile < in_use.size(); ++tile) {
            std::vector<float> & turned = known[i][in_use[tile]];
            if (turned.empty()) {
                turned = rope.basis((double) in_use[tile]*llama_turbo_tiles::SIZE);
            }
            std::copy(turned.begin(), turned.end(), basis.begin() + tile*turned.size());
        }
        ggml_backend_tensor_set(bases[i], basis.data(), 0, ggml_nbytes(bases[i]));
    }
}

// ---- of a batch ----

// The tiles that a batch sees and stores. More would be needed by no graph with as many cells in use, if positions followed
// one another; where they do not, the graph is built again when there are more.
static size_t room_for(const llama_kv_cache_context * batch) {
    const size_t consecutive = batch->get_n_kv()/llama_turbo_tiles::SIZE + 2;
    return GGML_PAD(std::max(consecutive, llama_turbo_kv::tiles(batch).size()), 8);
}

llm_graph_input_turbo_batch_centers::llm_graph_input_turbo_batch_centers(
        ggml_context * ctx, const llama_kv_cache_context * batch, bool is_swa, int64_t n_tokens)
    : llm_graph_input_turbo_centers(ctx, llama_turbo_kv::of(batch).keys, room_for(batch)), is_swa(is_swa), batch(batch) {
    tiles       = llama_turbo_kv::tiles(batch);
    token_tiles = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_tokens);
    ggml_set_input(token_tiles);
}

llm_graph_input_turbo_batch_centers * llm_graph_input_turbo_batch_centers::find(llm_graph_result * res, bool is_swa) {
    for (const auto & input : res->inputs) {
        auto * found = dynamic_cast<llm_graph_input_turbo_batch_centers *>(input.get());
        if (found && found->is_swa == is_swa) {
            return found;
        }
    }
    return nullptr;
}

void llm_graph_input_turbo_batch_centers::set_input(const llama_ubatch * ubatch) {
    set(tiles);
    if (token_tiles->buffer) {
        std::vector<int32_t> of_tokens;
        for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
            of_tokens.push_back(tiles.index_of(ubatch->pos[i]));
        }
        ggml_backend_tensor_set(token_tiles, of_tokens.data(), 0, ggml_nbytes(token_tiles));
    }
}

bool llm_graph_input_turbo_batch_centers::can_reuse(const llm_graph_params & params) {
    batch = llama_turbo_kv::cache_of(params.mctx, is_swa);
    if (!batch || token_tiles->ne[0] != params.ubatch.n_tokens) {
        return false;
    }
    tiles = llama_turbo_kv::tiles(batch);
    return tiles.size() <= n_tiles();
}

// ---- of a context shift ----

llm_graph_input_turbo_shift_centers::llm_graph_input_turbo_shift_centers(ggml_context * ctx, const llama_kv_cache * cache)
    : llm_graph_input_turbo_centers(ctx, llama_turbo_kv::of(*cache).keys, llama_turbo_kv::shift_tiles(*cache, nullptr, nullptr).size()),
      cache(cache) {
    old_tiles = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, llama_turbo_kv::n_cells(*cache));
    new_tiles = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, llama_turbo_kv::n_cells(*cache));
    ggml_set_input(old_tiles);
    ggml_set_input(new_tiles);
}

void llm_graph_input_turbo_shift_centers::set_input(const llama_ubatch *) {
    std::vector<int32_t> before, after;
    set(llama_turbo_kv::shift_tiles(*cache, &before, &after));
    ggml_backend_tensor_set(old_tiles, before.data(), 0, ggml_nbytes(old_tiles));
    ggml_backend_tensor_set(new_tiles, after.data(),  0, ggml_nbytes(new_tiles));
}
