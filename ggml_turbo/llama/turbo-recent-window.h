#pragma once

// The recent window of a KV cache: beside a quantized cache, which always holds every token, the keys and values of a few
// tokens at full precision (docs/recent-window.md). A query at position p sees in full precision the tokens at positions
// p - n_recent + 1 to p and the first n_sinks of its sequence, wherever that begins, and all others quantized, whatever the
// batches were.
//
// A ring in f16 holds the tokens before a batch, and the batch's own are at hand anyway. The ring is never the only copy:
// whatever makes an entry doubtful only forgets it, and the quantized one is read instead. All sequences of a stream share
// one ring, which keeps the tokens nearest to the ends of their sequences: where many sequences want more room than there
// is, the windows of all become shorter.

#include "llama.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

class  llama_io_read_i;
class  llama_io_write_i;
class  llama_kv_cells;
struct llama_ubatch;

class llama_turbo_window {
public:
    // What the window is to be, in tokens, as the context's settings say (turbo-settings.h).
    struct size {
        uint32_t recent, sinks;

        // cells: for each sequence.
        static size wanted(ggml_type type_k, ggml_type type_v, uint32_t cells);
    };

    // A layer's cache: keys and values [channels, cells, streams], null if there are none of their own.
    struct cache {
        ggml_tensor * k, * v;
        uint32_t      head_size_k, head_size_v;
        uint32_t      n_heads, n_kv_heads;
    };

    // Null if there is to be no window; the log says why if one was to be expected. caches: of all layers, by the index
    // that the cache has for them. n_seq: sequences of one stream. is_needed: attention needs the operator, be it with a window
    // of no tokens. Cache and ring together never take more memory than the cache in f16.
    static std::shared_ptr<llama_turbo_window> make(
        const std::vector<cache> & caches, ggml_type type_k, ggml_type type_v, bool v_trans, uint32_t n_stream, uint32_t n_seq,
        bool no_alloc, bool is_needed);

    // Why the operator cannot attend to these; empty if it can.
    static std::string reason_against(const std::vector<cache> & caches, bool v_trans);

    // The memory of the rings, which the cache keeps with its own: each ring lies where its layer's cache does.
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> memories;

    uint32_t slots() const { return n_slots; } // of a stream

    const size & kept() const { return sizes; } // of each sequence

    // ---- graphs ----

    const ggml_tensor * memory(uint32_t layer) const { return rings[layer]; }

    // A layer's ring as attention takes it, for n streams from the first one on.
    ggml_tensor * ring(ggml_context * ctx, uint32_t layer, uint32_t first, uint32_t n) const;

    // Nodes that keep what should be kept of a batch's k and v, [head size, KV heads, tokens]; rows: as set_inputs says.
    ggml_tensor * store_k(ggml_context * ctx, uint32_t layer, ggml_tensor * k, ggml_tensor * rows) const;
    ggml_tensor * store_v(ggml_context * ctx, uint32_t layer, ggml_tensor * v, ggml_tensor * rows) const;

    // ---- what is in the ring ----

    // Of the token in a slot; -1 if there is none.
    llama_pos position(uint32_t stream, uint32_t slot) const {
        return slot < entries[stream].size() ? entries[stream][slot].pos : -1;
    }

    // A token of the cache: its stream and cell.
    struct place {
        uint32_t stream, cell;
    };

    // These cells are being written.
    void written(const std::vector<place> & places);

    // A stream becomes a copy of another, in the memory of the devices too: nothing may be computing.
    void copy(uint32_t from, uint32_t to);

    // The part of a saved state that holds what the window has of some cells, in their order; nothing if it has none of
    // them. A reader calls restore once these cells have been filled, or skip where there is no window; both return false if
    // the state is not of this model's window.
    void save(llama_io_write_i & io, uint32_t stream, const std::vector<uint32_t> & saved, const llama_kv_cells & cells) const;
    bool restore(llama_io_read_i & io, uint32_t stream, const std::vector<uint32_t> & restored, const llama_kv_cells & cells);
    static bool skip(llama_io_read_i & io, size_t n_cells);

    // Inputs of a graph. places: of the batch's tokens, those of a stream together. mask: of the cache, which is set. The
    // next two are attention's (turbo-window.h); rows: I64 [tokens], of the ring. stores: the graph stores the batch's tokens
    // in all rings; otherwise none is kept.
    void set_inputs(
        const std::vector<place> & places, const llama_ubatch & ubatch, const std::vector<llama_kv_cells> & cells,
        const ggml_tensor * mask, ggml_tensor * window_mask, ggml_tensor * columns, ggml_tensor * rows, bool stores);

private:
    struct entry {
        uint32_t     cell;
        uint32_t     version; // of the cell when it was stored
        llama_pos    pos;     // -1: nothing is there
        bool         is_sink;
        llama_seq_id seq;     // whose slot it is or was last; slots are given to the same sequence again where that is possible
    };

    size     sizes;
    uint32_t n_slots; // of a stream, and a last one that takes what is not kept
    bool     poison;  // for tests: what was forgotten becomes conspicuous

    std::vector<ggml_tensor *>         rings;    // by layer: F16 [channels of keys, then of values; slots, streams]
    std::vector<int64_t>               size_k;   // by layer: channels of keys
    std::vector<std::vector<entry>>    entries;  // by stream and slot
    std::vector<std::vector<uint32_t>> versions; // by stream and cell: how often it was written

    // A token that could be kept.
    struct arrival {
        uint32_t     cell;
        llama_seq_id seq; // one of its sequences
    };

    bool is_sink(const llama_kv_cells & cells, const arrival & a) const;
    bool is_valid(const entry & e, uint32_t stream, const llama_kv_cells & cells) const;
    llama_pos age(const llama_kv_cells & cells, const arrival & a, bool is_sink) const;
    std::vector<uint32_t> admit(uint32_t stream, const llama_kv_cells & cells, const std::vector<arrival> & arrivals);
    size_t token_bytes() const;
    void spoil(uint32_t stream, uint32_t slot) const;
};
