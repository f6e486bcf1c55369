#include "turbo-kv.h"

#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache-msa.h"
#include "llama-kv-cache.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"
#include "turbo-cache-facts.h"
#include "turbo-cache-types.h"
#include "turbo-centers.h"
#include "turbo-settings.h"
#include "turbo-value-rotation.h"

#include <algorithm>
#include <cmath>
#include <mutex>
#include <stdexcept>

static std::mutex                                                    stores_mutex;
static std::map<const ggml_tensor *, llama_turbo_kv::key_store> stores;

std::unique_ptr<llama_turbo_kv> llama_turbo_kv::make(llama_kv_cache & cache) {
    auto made = std::make_unique<llama_turbo_kv>();
    if (cache.layers.empty()) {
        return made;
    }
    const bool values_rotated = llama_turbo_values_rotated(cache.model.gguf_kv);
    if (values_rotated) { // by the weights, which also rotate the result back: a second rotation would undo the first
        cache.attn_rot_v = false;
    }
    const llama_hparams & hparams = cache.hparams;
    const ggml_type type_k = cache.layers[0].k->type, type_v = cache.layers[0].v ? cache.layers[0].v->type : type_k;
    if (cache.other) {
        made->keys   = cache.other->turbo->keys;
        made->latent = cache.other->turbo->latent;
    } else {
        std::vector<llama_turbo_window::cache> caches;
        for (const auto & layer : cache.layers) {
            caches.push_back({
                layer.k, layer.v, hparams.n_embd_head_k(layer.il), hparams.n_embd_head_v(layer.il), hparams.n_head(layer.il),
                hparams.n_head_kv(layer.il),
            });
        }
        std::map<uint32_t, llama_turbo_keys::place>    places;
        std::map<uint32_t, ggml_backend_buffer_type_t> bufts;
        for (const auto & [il, id] : cache.map_layer_ids) {
            bufts[il]  = ggml_backend_buffer_get_type(cache.layers[id].k->buffer);
            places[il] = { cache.layers[id].il, bufts[il] };
        }
        made->keys = llama_turbo_keys::make(cache.model, type_k, places, llama_turbo_window::reason_against(caches, cache.v_trans));
        if (hparams.is_mla() && turbo_is_type(type_k) && cache.attn_rot_k) {
            made->latent = llama_turbo_latent::make(bufts);
        }
        made->window = llama_turbo_window::make(
            caches, type_k, type_v, cache.v_trans, cache.n_stream, cache.n_seq_max/cache.n_stream, hparams.no_alloc,
            made->keys && made->keys->turns());
        if (made->window) { // its memory is counted and cleared with the cache's own
            std::move(made->window->memories.begin(), made->window->memories.end(), std::back_inserter(cache.ctxs_bufs));
        }
    }
    if (!hparams.no_alloc) { // otherwise it only measures itself
        uint64_t bytes = 0;
        for (const auto & layer : cache.layers) {
            bytes += ggml_nbytes(layer.k) + (layer.v ? ggml_nbytes(layer.v) : 0);
        }
        const auto sizes = made->window ? made->window->kept() : llama_turbo_window::size { 0, 0 };
        llama_turbo_tell({ type_k, type_v, (uint32_t) cache.layers.size(), (uint32_t) cache.layers[0].k->ne[1], bytes, sizes.recent,
            sizes.sinks, llama_turbo_is_draft() });
    }
    made->mark = (made->keys ? made->keys->hash() : 0) ^ (values_rotated ? 2 : 0) ^ (made->latent ? 4 : 0);

    std::lock_guard<std::mutex> lock(stores_mutex);
    const uint32_t n_changed = made->keys || made->window ? cache.layers.size() : 0;
    for (uint32_t i = 0; i < n_changed; ++i) {
        key_store store = { made.get(), i, nullptr, {}, false, made->window ? made->window->memory(i) : nullptr };
        for (const auto & [il, id] : cache.map_layer_ids) {
            if (made->keys && (uint32_t) id == i && made->keys->scale(il)) {
                store.scale = made->keys->scale(il);
                store.q_scales.push_back(made->keys->q_scale(il));
                store.turns = made->keys->turns(il);
            }
        }
        stores.emplace(cache.layers[i].k, store);
    }
    return made;
}

llama_turbo_kv::~llama_turbo_kv() {
    std::lock_guard<std::mutex> lock(stores_mutex);
    for (auto it = stores.begin(); it != stores.end();) {
        it = it->second.turbo == this ? stores.erase(it) : std::next(it);
    }
}

std::map<const ggml_tensor *, llama_turbo_kv::key_store> llama_turbo_kv::key_tensors() {
    std::lock_guard<std::mutex> lock(stores_mutex);
    return stores;
}

bool llama_turbo_kv::accepts(const attended & found) const {
    if (!found.uncalibrated.empty()) {
        const std::string reason = format(
            "keys cannot be calibrated: %zu layers of this model store or read them elsewhere than where queries are calibrated. "
            "Set TURBO_CALIBRATION=0, or use a cache of f16", found.uncalibrated.size());
        if (!has_graph) {
            throw std::runtime_error(reason);
        }
        LLAMA_LOG_ERROR("%s: %s\n", __func__, reason.c_str());
        return false;
    }
    has_graph = true;
    if (!found.without_window.empty() && !is_window_off) {
        LLAMA_LOG_WARN("llama_kv_cache: no recent window: %zu of %zu layers of this model attend to their keys in a way that has none\n",
            found.without_window.size(), found.layers.size());
        is_window_off = true;
    }
    return true;
}

const llama_turbo_kv & llama_turbo_kv::of(const llama_kv_cache & cache) {
    return *cache.turbo;
}

const llama_turbo_kv & llama_turbo_kv::of(const llama_kv_cache_context * batch) {
    return of(*batch->kv);
}

const llama_kv_cache_context * llama_turbo_kv::cache_of(const llama_memory_context_i * memory, bool is_swa) {
    if (const auto * hybrid = dynamic_cast<const llama_memory_hybrid_context *>(memory)) {
        memory = hybrid->get_attn();
    } else if (const auto * hybrid_iswa = dynamic_cast<const llama_memory_hybrid_iswa_context *>(memory)) {
        memory = hybrid_iswa->get_attn();
    }
    if (const auto * iswa = dynamic_cast<const llama_kv_cache_iswa_context *>(memory)) {
        return is_swa ? iswa->get_swa() : iswa->get_base();
    }
    if (const auto * msa = dynamic_cast<const llama_kv_cache_msa_context *>(memory)) {
        return msa->get_base();
    }
    return dynamic_cast<const llama_kv_cache_context *>(memory);
}

// ---- graphs ----

void llama_turbo_kv::calibrate_layer(
        ggml_context * ctx, llm_graph_result * res, const llama_kv_cache_context * batch, bool is_swa, ggml_tensor *& q,
        ggml_tensor *& k, int32_t il) {
    const auto & keys = of(batch).keys;
    if (!keys) {
        return;
    }
    llm_graph_input_turbo_batch_centers * centers = llm_graph_input_turbo_batch_centers::find(res, is_swa);
    if (!centers && keys->turns()) {
        auto made = std::make_unique<llm_graph_input_turbo_batch_centers>(ctx, batch, is_swa, q->ne[2]);
        centers = static_cast<llm_graph_input_turbo_batch_centers *>(res->add_input(std::move(made)));
    }
    if (keys->turns(il)) {
        centers->biases[il] = keys->q_centers(ctx, q, il, *centers);
    }
    q = keys->apply_q(ctx, q, il);
    k = k ? keys->apply_k(ctx, k, il, centers, centers ? centers->token_tiles : nullptr) : nullptr;
}

void llama_turbo_kv::calibrate(
        ggml_context * ctx, const llama_hparams &, llm_graph_result * res, const llama_kv_cache_context * batch, ggml_tensor *& q,
        ggml_tensor *& k, int32_t il) {
    calibrate_layer(ctx, res, batch, false, q, k, il);
}

void llama_turbo_kv::calibrate(
        ggml_context * ctx, const llama_hparams & hparams, llm_graph_result * res, const llama_kv_cache_iswa_context * batch,
        ggml_tensor *& q, ggml_tensor *& k, int32_t il) {
    const bool is_swa = hparams.is_swa(il);
    calibrate_layer(ctx, res, is_swa ? batch->get_swa() : batch->get_base(), is_swa, q, k, il);
}

llama_turbo_kv::rotated_latent::rotated_latent(
        ggml_context * ctx, const llama_kv_cache_context * batch, ggml_tensor *& q, ggml_tensor *& k, ggml_tensor *& v_mla, int32_t il)
    : latent(of(batch).latent.get()), v_mla(v_mla) {
    if (latent) {
        q     = latent->rotate(ctx, q, il);
        k     = latent->rotate(ctx, k, il);
        v_mla = nullptr;
    }
}

ggml_tensor * llama_turbo_kv::rotated_latent::decompress(ggml_context * ctx, ggml_tensor * cur, int64_t n_head, int32_t il) const {
    return latent ? latent->decompress(ctx, cur, v_mla, n_head, il) : cur;
}

uint32_t llama_turbo_kv::layer(const llama_kv_cache_context * batch, int32_t il) {
    return batch->kv->map_layer_ids.at(il);
}

uint32_t llama_turbo_kv::users(const llama_kv_cache_context * batch, uint32_t layer) {
    const auto & layers = batch->kv->map_layer_ids;
    return std::count_if(layers.begin(), layers.end(), [layer](const auto & entry) { return (uint32_t) entry.second == layer; });
}

uint32_t llama_turbo_kv::first_stream(const llama_kv_cache_context * batch) {
    return batch->sinfos[batch->i_cur].s0;
}

void llama_turbo_kv::set_window_inputs(
        const llama_kv_cache_context * batch, const llama_ubatch & ubatch, const ggml_tensor * mask, ggml_tensor * window_mask,
        ggml_tensor * columns, ggml_tensor * rows, bool stores) {
    of(batch).window->set_inputs(
        window_places(batch->sinfos[batch->i_cur]), ubatch, batch->kv->v_cells, mask, window_mask, columns, rows, stores);
}

ggml_tensor * llama_turbo_kv::shift(
        ggml_context * ctx, llm_graph_result * res, const llama_kv_cache & cache, const llama_cparams & cparams, uint32_t il,
        ggml_tensor * shifts, ggml_tensor * rotation, ggml_tensor * factors, float freq_base, float freq_scale) {
    ggml_tensor * stored = cache.layers[cache.map_layer_ids.at(il)].k;
    const llama_hparams  & hparams = cache.hparams;
    const llama_turbo_kv & turbo   = *cache.turbo;
    if (!ggml_is_quantized(stored->type) && !turbo.keys) {
        return nullptr;
    }
    const bool    is_latent = hparams.is_mla();
    const int64_t n_rot = hparams.n_rot(il), size = hparams.n_embd_head_k(il), n_head = hparams.n_head_kv(il);
    const int64_t before  = hparams.n_lora_kv > 0 ? size - n_rot : 0; // channels that have no position, of each head
    const size_t  row     = stored->nb[1], head = ggml_row_size(stored->type, size);
    const int64_t n_cells = stored->ne[1]*stored->ne[2];

    // Whole heads, since rotation and calibration mix all channels; of MLA keys, rotated by blocks, the part with positions.
    ggml_tensor * k = is_latent
        ? ggml_view_3d(ctx, stored, n_rot, n_head, n_cells, head, row, ggml_row_size(stored->type, before))
        : ggml_view_3d(ctx, stored, size,  n_head, n_cells, head, row, 0);
    if (is_latent) { // llama.cpp stores them as they are, whatever it says of their rotation
        rotation = turbo.latent ? turbo.latent->rotation(il) : nullptr;
    }
    const auto rotate = [&](ggml_tensor * x) { return rotation ? llama_mul_mat_hadamard(ctx, x, rotation) : x; };
    // Keys got YaRN's factor when they were computed. The operator multiplies by one of its own, which is taken back.
    const float factor = cparams.yarn_ext_factor != 0.0f ? 1.0f/(1.0f + 0.1f*logf(1.0f/freq_scale)) : 1.0f;
    const auto rope = [&](ggml_tensor * x) {
        return ggml_rope_ext(
            ctx, x, shifts, factors, n_rot, hparams.rope_type, cparams.n_ctx_orig_yarn, freq_base, freq_scale, cparams.yarn_ext_factor,
            factor, cparams.yarn_beta_fast, cparams.yarn_beta_slow);
    };
    llm_graph_input_turbo_shift_centers * centers = nullptr;
    if (turbo.keys && turbo.keys->turns(il)) {
        for (const auto & input : res->inputs) {
            centers = centers ? centers : dynamic_cast<llm_graph_input_turbo_shift_centers *>(input.get());
        }
        if (!centers) {
            auto made = std::make_unique<llm_graph_input_turbo_shift_centers>(ctx, &cache);
            centers = static_cast<llm_graph_input_turbo_shift_centers *>(res->add_input(std::move(made)));
        }
    }
    ggml_tensor * moved = rotate(ggml_cast(ctx, k, GGML_TYPE_F32));
    if (turbo.keys) {
        moved = turbo.keys->undo_k(ctx, moved, il, centers, centers ? centers->old_tiles : nullptr);
    }
    if (before > 0 && !is_latent) {
        ggml_tensor * without = ggml_view_3d(ctx, moved, before, n_head, n_cells, moved->nb[1], moved->nb[2], 0);
        ggml_tensor * with    = ggml_view_3d(ctx, moved, n_rot,  n_head, n_cells, moved->nb[1], moved->nb[2], before*moved->nb[0]);
        moved = ggml_concat(ctx, without, rope(with), 0);
    } else {
        moved = rope(moved);
    }
    if (turbo.keys) {
        moved = turbo.keys->apply_k(ctx, moved, il, centers, centers ? centers->new_tiles : nullptr);
    }
    moved = rotate(moved);
    if (!ggml_is_contiguous(k)) { // no back end quantizes into rows that do not lie side by side
        moved = ggml_cast(ctx, moved, k->type);
    }
    return ggml_cpy(ctx, moved, k);
}

// ---- tiles of positions ----

llama_turbo_tiles llama_turbo_kv::tiles(const llama_kv_cache_context * batch) {
    llama_turbo_tiles found;
    const auto & slots = batch->sinfos[batch->i_cur];
    for (uint32_t stream = slots.s0; stream <= slots.s1; ++stream) {
        const llama_kv_cells & cells = batch->kv->v_cells[stream];
        for (uint32_t cell = 0; cell < batch->get_n_kv(); ++cell) {
            if (!cells.is_empty(cell)) {
                found.add(cells.pos_get(cell));
            }
        }
    }
    found.sort();
    return found;
}

void llama_turbo_kv::set_window_tiles(
        const llama_kv_cache_context * batch, const llama_ubatch & ubatch, int64_t n_kv, llama_turbo_tiles & tiles, ggml_tensor * columns) {
    const llama_turbo_window & window = *of(batch).window;
    const auto places = window_places(batch->sinfos[batch->i_cur]);
    const int64_t n_streams = columns->ne[3], n_queries = places.size()/n_streams;
    for (int64_t s = 0; s < n_streams; ++s) {
        const uint32_t stream = places[s*n_queries].stream;
        const llama_kv_cells & cells = batch->kv->v_cells[stream];
        int32_t * to = (int32_t *) ((char *) columns->data + s*columns->nb[3]) + n_kv;
        for (int64_t cell = 0; cell < n_kv; ++cell) {
            *to++ = cells.is_empty(cell) ? 0 : tiles.index_of(cells.pos_get(cell));
        }
        for (uint32_t slot = 0; slot < window.slots(); ++slot) {
            *to++ = tiles.index_of(window.position(stream, slot));
        }
        for (int64_t i = s*n_queries; i < (s + 1)*n_queries; ++i) {
            *to++ = tiles.index_of(ubatch.pos[i]);
        }
    }
}

llama_turbo_tiles llama_turbo_kv::shift_tiles(const llama_kv_cache & cache, std::vector<int32_t> * before, std::vector<int32_t> * after) {
    llama_turbo_tiles found;
    const auto each_cell = [&cache](auto && visit) {
        for (const llama_kv_cells & cells : cache.v_cells) {
            for (uint32_t cell = 0; cell < cells.size(); ++cell) {
                const llama_pos pos = cells.is_empty(cell) ? 0 : cells.pos_get(cell);
                visit(cells.is_empty(cell) ? 0 : pos - cells.get_shift(cell), pos);
            }
        }
    };
    each_cell([&](llama_pos old_pos, llama_pos new_pos) { found.add(old_pos), found.add(new_pos); });
    found.sort();
    if (before && after) {
        llama_turbo_tiles copy = found; // each remembers where it was last
        each_cell([&](llama_pos old_pos, llama_pos new_pos) {
            before->push_back(copy.index_of(old_pos));
            after->push_back(found.index_of(new_pos));
        });
    }
    return found;
}

int64_t llama_turbo_kv::n_cells(const llama_kv_cache & cache) {
    return (int64_t) cache.get_size()*cache.n_stream;
}

// ---- saved states ----

// No v_trans, which is 0 or 1.
static const uint32_t MARK = 0x6d627274, WINDOW = 0x776e6469;

void llama_turbo_kv::save(llama_io_write_i & io, const llama_kv_cache & cache, uint32_t stream, const std::vector<uint32_t> & cells) const {
    if (mark != 0) {
        io.write(&MARK, sizeof(MARK));
        io.write(&mark, sizeof(mark));
    }
    if (window) {
        io.write(&WINDOW, sizeof(WINDOW));
        window->save(io, stream, cells, cache.v_cells[stream]);
    }
}

bool llama_turbo_kv::restore(
        llama_io_read_i & io, const llama_kv_cache & cache, uint32_t stream, const std::vector<uint32_t> & restored, uint32_t & v_trans) {
    if (window) { // what it had of these cells is out of date
        std::vector<llama_turbo_window::place> places;
        for (uint32_t cell : restored) {
            places.push_back({ stream, cell });
        }
        window->written(places);
    }
    uint64_t found = 0;
    if (v_trans == MARK) {
        io.read(&found, sizeof(found));
        io.read(&v_trans, sizeof(v_trans));
    }
    if (found != mark) {
        LLAMA_LOG_ERROR("%s: this state was saved by a model whose keys are calibrated otherwise, or whose values are rotated otherwise "
            "(%016llx, not %016llx): evaluate its tokens again\n", __func__, (unsigned long long) found, (unsigned long long) mark);
        return false;
    }
    if (v_trans == WINDOW) {
        const bool is_right = window ? window->restore(io, stream, restored, cache.v_cells[stream])
                                     : llama_turbo_window::skip(io, restored.size());
        if (!is_right) {
            LLAMA_LOG_ERROR("%s: the recent window of this state is damaged, or of another model: evaluate its tokens again\n", __func__);
            return false;
        }
        io.read(&v_trans, sizeof(v_trans));
    }
    return true;
}

bool llama_turbo_kv::is_position(llama_pos pos) {
    if (pos >= 0 && pos <= INT32_MAX/2) { // what comes after it must have a position, too
        return true;
    }
    LLAMA_LOG_ERROR("%s: this state is damaged: %d is no position of a token\n", __func__, pos);
    return false;
}
