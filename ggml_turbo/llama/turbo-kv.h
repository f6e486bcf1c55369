#pragma once

// What this project adds to a KV cache of llama.cpp, in one object: calibrated keys (turbo-calibration.h), rotated keys of
// MLA (turbo-latent-keys.h) and the recent window (turbo-recent-window.h). llama_kv_cache owns it and calls it wherever keys
// and values are stored, read, moved or saved; it reads the cache's own members as a friend.

#include "turbo-calibration.h"
#include "turbo-latent-keys.h"
#include "turbo-recent-window.h"

#include <map>
#include <memory>
#include <set>
#include <vector>

class  llama_kv_cache;
class  llama_kv_cache_context;
class  llama_kv_cache_iswa_context;
class  llama_turbo_tiles;
class  llm_graph_result;
struct llama_cparams;
struct llama_hparams;
struct llama_memory_context_i;
struct llama_ubatch;

struct llama_turbo_kv {
    std::shared_ptr<llama_turbo_keys>   keys;   // null: keys are stored as they are
    std::shared_ptr<llama_turbo_latent> latent; // null: keys are no MLA keys, or are not rotated
    std::shared_ptr<llama_turbo_window> window; // null: there is none

    // For a cache whose layers have been made. One that shares another's cells shares what is done to its keys. Tells the
    // cache not to rotate values that the weights have rotated.
    // Throws if the cache cannot hold its types: the log says why by name.
    static std::unique_ptr<llama_turbo_kv> make(llama_kv_cache & cache);

    ~llama_turbo_kv();

    // That of a cache, or of the cache of a batch.
    static const llama_turbo_kv & of(const llama_kv_cache & cache);
    static const llama_turbo_kv & of(const llama_kv_cache_context * batch);

    // A batch's part in the cache whose keys and values a layer attends to; null if its memory is of a kind not known here.
    // is_swa: which of the two caches that a model with sliding windows has.
    static const llama_kv_cache_context * cache_of(const llama_memory_context_i * memory, bool is_swa);

    // ---- graphs ----

    // q and k [head size, heads, tokens] as they will be rotated, stored and multiplied; k may be null.
    static void calibrate(
        ggml_context * ctx, const llama_hparams & hparams, llm_graph_result * res, const llama_kv_cache_context * batch,
        ggml_tensor *& q, ggml_tensor *& k, int32_t il);
    static void calibrate(
        ggml_context * ctx, const llama_hparams & hparams, llm_graph_result * res, const llama_kv_cache_iswa_context * batch,
        ggml_tensor *& q, ggml_tensor *& k, int32_t il);
    static void calibrate_layer(
        ggml_context * ctx, llm_graph_result * res, const llama_kv_cache_context * batch, bool is_swa, ggml_tensor *& q,
        ggml_tensor *& k, int32_t il);

    // What llm_graph_context::build_attn_mha makes of these, with the window; null if the cache has none, or if layer il reads
    // keys that are not of this graph. memory: of the batch, and batch its cache for layer il. k, v: of the cache; k_cur,
    // v_cur: of the batch, null in layers that share another's. It is computed where the layer's cache is.
    // (turbo-window-graph.cpp)
    static ggml_tensor * attend(
        ggml_context * ctx, ggml_cgraph * gf, ggml_backend_sched_t sched, llm_graph_result * res, const llama_memory_context_i * memory,
        const llama_kv_cache_context * batch, const llama_hparams & hparams, const llama_cparams & cparams, ggml_tensor * q,
        ggml_tensor * k, ggml_tensor * v, ggml_tensor * k_cur, ggml_tensor * v_cur, ggml_tensor * bias, ggml_tensor * kq_mask,
        ggml_tensor * sinks, float kq_scale, int il);

    // Values as a kernel that takes no quantized ones wants them.
    static ggml_tensor * decoded(ggml_context * ctx, ggml_tensor * v) {
        return ggml_is_quantized(v->type) ? ggml_cast(ctx, v, GGML_TYPE_F32) : v;
    }

    // Keys and queries of MLA, which are rotated where the cache says so. Then v_mla, which decompresses the result of
    // attention, is taken away: the result is rotated back before.
    class rotated_latent {
    public:
        rotated_latent(
            ggml_context * ctx, const llama_kv_cache_context * batch, ggml_tensor *& q, ggml_tensor *& k, ggml_tensor *& v_mla,
            int32_t il);
        ggml_tensor * decompress(ggml_context * ctx, ggml_tensor * cur, int64_t n_head, int32_t il) const;

    private:
        const llama_turbo_latent * latent; // null: nothing is rotated
        ggml_tensor *              v_mla;
    };

    // The index that the cache has for a layer of the model.
    static uint32_t layer(const llama_kv_cache_context * batch, int32_t il);

    // How many layers of the model have the cache's layer of this index.
    static uint32_t users(const llama_kv_cache_context * batch, uint32_t layer);

    // The first stream of a batch.
    static uint32_t first_stream(const llama_kv_cache_context * batch);

    static void set_window_inputs(
        const llama_kv_cache_context * batch, const llama_ubatch & ubatch, const ggml_tensor * mask, ggml_tensor * window_mask,
        ggml_tensor * columns, ggml_tensor * rows, bool stores);

    // The node that moves a quantized layer's keys to other positions, one shift for each cell; null for other types, which
    // llama.cpp moves itself. rotation: of the cache's keys, null if there is none; the rest as ggml_rope_ext takes it.
    static ggml_tensor * shift(
        ggml_context * ctx, llm_graph_result * res, const llama_kv_cache & cache, const llama_cparams & cparams, uint32_t il,
        ggml_tensor * shifts, ggml_tensor * rotation, ggml_tensor * factors, float freq_base, float freq_scale);

    // ---- tiles of positions (turbo-centers.h) ----

    // Those of all cells that a batch sees or stores.
    static llama_turbo_tiles tiles(const llama_kv_cache_context * batch);

    // The tile of each key of attention in the first columns.ne[0] cells and, where the batch has a window, in the ring and the
    // batch: I32, after the columns of the cache's keys. To be set before the inputs of the window.
    static void set_window_tiles(
        const llama_kv_cache_context * batch, const llama_ubatch & ubatch, int64_t n_kv, llama_turbo_tiles & tiles, ggml_tensor * columns);

    // Those of all cells before and after a shift that is due, and if wanted the tile of each cell.
    static llama_turbo_tiles shift_tiles(const llama_kv_cache & cache, std::vector<int32_t> * before, std::vector<int32_t> * after);

    static int64_t n_cells(const llama_kv_cache & cache); // of all streams

    // ---- what happens to cells ----

    // Template arguments are types that are private to the cache: places of a batch, ranges of cells.

    // The cells of a batch are being written.
    template <typename slot_info>
    void written(const slot_info & places) {
        if (window) {
            window->written(window_places(places));
        }
    }

    // The keys and values of a stream become a copy of another's.
    void copied(uint32_t from, uint32_t to) {
        if (window) {
            window->copy(from, to);
        }
    }

    // ---- saved states ----

    // What a state says before everything else of a stream's keys and values: what they were transformed by, and the recent
    // window of the saved cells. Nothing where nothing was done, as in stock llama.cpp.
    template <typename cell_ranges>
    void save(llama_io_write_i & io, const llama_kv_cache & cache, const cell_ranges & ranges) const {
        std::vector<uint32_t> cells;
        for (const auto & [begin, end] : ranges.data) {
            for (uint32_t cell = begin; cell < end; ++cell) {
                cells.push_back(cell);
            }
        }
        save(io, cache, ranges.strm, cells);
    }

    // v_trans: what a reader of stock llama.cpp has read in its place. False, with a line in the log, if the state is of
    // another model or damaged. restored: cells of the stream, in the order in which they were saved.
    bool restore(llama_io_read_i & io, const llama_kv_cache & cache, uint32_t stream, const std::vector<uint32_t> & restored, uint32_t & v_trans);

    // Whether a saved token can have this position; a line in the log if not.
    static bool is_position(llama_pos pos);

    // ---- what a graph did (turbo-graph-check.cpp) ----

    // The keys of a layer of a cache, where they are calibrated or have a recent window.
    struct key_store {
        const llama_turbo_kv *           turbo;
        uint32_t                         layer;    // by the index that the cache has for it
        const ggml_tensor *              scale;    // of keys; null: they are not calibrated
        std::vector<const ggml_tensor *> q_scales; // of the queries of all layers of the model that read them
        bool                             turns;    // their centre turns with the position
        const ggml_tensor *              ring;     // null: there is no recent window
    };

    // Those of all caches there are, by the tensor that holds the keys.
    static std::map<const ggml_tensor *, key_store> key_tensors();

    // Layers of a cache that a graph attends to.
    struct attended {
        std::set<uint32_t> layers, uncalibrated, without_window;
    };

    // Throws if the first graph of a cache has calibrated keys with other queries; false, with a line in the log, if a later
    // one has. Where a layer attends without the recent window, it is switched off from the next graph on.
    bool accepts(const attended & found) const;

private:
    mutable bool has_graph = false; // one was accepted
    mutable bool is_window_off = false;

    uint64_t mark = 0; // of everything that keys and values are transformed by; 0: nothing

    template <typename slot_info>
    static std::vector<llama_turbo_window::place> window_places(const slot_info & slots) {
        std::vector<llama_turbo_window::place> places;
        for (uint32_t s = 0; s < slots.n_stream(); ++s) {
            for (uint32_t cell : slots.idxs[s]) {
                places.push_back({ (uint32_t) slots.strm[s], cell });
            }
        }
        return places;
    }

    void save(llama_io_write_i & io, const llama_kv_cache & cache, uint32_t stream, const std::vector<uint32_t> & cells) const;
};

// Whether a graph is what its caches need: false, with a line in the log, or an exception where a context is being made.
bool llama_turbo_check_graph(ggml_cgraph * graph);
