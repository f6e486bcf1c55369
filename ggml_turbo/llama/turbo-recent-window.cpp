#include "turbo-recent-window.h"

#include "ggml-turbo.h"
#include "llama-batch.h"
#include "llama-impl.h"
#include "llama-kv-cells.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

static const ggml_fp16_t MASKED = ggml_fp32_to_fp16(-INFINITY);

// Tokens that can be taken back, as rejected drafts are, and the window before them is still whole.
static const uint32_t TAKEN_BACK = 16;

static uint32_t number(const char * variable, uint32_t otherwise) {
    const char * text = getenv(variable);
    if (!text || !*text) {
        return otherwise;
    }
    char * end;
    const long long value = std::strtoll(text, &end, 10);
    if (*end || value < 0 || value > INT32_MAX) {
        throw std::runtime_error(format("%s is '%s', which is not a number of tokens", variable, text));
    }
    return (uint32_t) value;
}

static bool is_turbo(ggml_type type) {
    return type == GGML_TYPE_TURBO2 || type == GGML_TYPE_TURBO3 || type == GGML_TYPE_TURBO4;
}

llama_turbo_window::size llama_turbo_window::size::wanted(ggml_type type_k, ggml_type type_v) {
    const uint32_t recent = number("LLAMA_ARG_CACHE_WINDOW", is_turbo(type_k) || is_turbo(type_v) ? 64 : 0);
    return { recent, recent ? number("LLAMA_ARG_CACHE_SINKS", 4) : 0 };
}

std::shared_ptr<llama_turbo_window> llama_turbo_window::make(
        const std::vector<cache> & caches, ggml_type type_k, ggml_type type_v, bool v_trans, uint32_t n_stream, uint32_t n_seq,
        bool no_alloc) {
    size sizes = size::wanted(type_k, type_v);
    if (!sizes.recent || !(ggml_is_quantized(type_k) || ggml_is_quantized(type_v)) || caches.empty()) {
        return nullptr;
    }
    const char * reason = v_trans ? "it needs flash attention" : nullptr;
    for (const cache & c : caches) {
        if (!c.v) {
            reason = "values are part of the keys (MLA)";
        } else if (!ggml_backend_buffer_is_host(c.k->buffer)) {
            reason = "the cache is on a device that has no kernel for it";
        } else if (c.head_size_k % QK_TURBO != 0 || c.head_size_v % QK_TURBO != 0) {
            reason = "its kernel takes head sizes that are multiples of 64";
        }
    }
    if (reason) {
        LLAMA_LOG_INFO("llama_kv_cache: no recent window: %s\n", reason);
        return nullptr;
    }

    const uint32_t cells = caches[0].k->ne[1];
    sizes = { std::min(sizes.recent, cells), std::min(sizes.sinks, cells) };

    auto made = std::make_shared<llama_turbo_window>();
    made->sizes   = sizes;
    made->n_seq_slots = sizes.sinks + sizes.recent + TAKEN_BACK;
    made->n_slots     = n_seq*made->n_seq_slots + 1;
    made->poison  = number("LLAMA_TURBO_WINDOW_POISON", 0) != 0;
    made->entries.assign(n_stream, std::vector<entry>(made->n_slots, { 0, 0, -1 }));
    made->versions.assign(n_stream, std::vector<uint32_t>(cells, 0));

    made->ctx.reset(ggml_init({ caches.size()*ggml_tensor_overhead(), nullptr, true }));
    size_t bytes = 0;
    for (const cache & c : caches) {
        ggml_tensor * t = ggml_new_tensor_3d(made->ctx.get(), GGML_TYPE_F16, c.k->ne[0] + c.v->ne[0], made->n_slots, n_stream);
        ggml_format_name(t, "%s_window", c.k->name);
        made->rings.push_back(t);
        made->size_k.push_back(c.k->ne[0]);
        bytes += ggml_nbytes(t);
    }
    ggml_backend_buffer_type_t buft = ggml_backend_cpu_buffer_type();
    if (no_alloc) {
        made->buf.reset(ggml_backend_buft_alloc_buffer(buft, 0));
        for (ggml_tensor * t = ggml_get_first_tensor(made->ctx.get()); t; t = ggml_get_next_tensor(made->ctx.get(), t)) {
            t->buffer = made->buf.get();
        }
    } else {
        made->buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(made->ctx.get(), buft));
        if (!made->buf) {
            throw std::runtime_error("failed to allocate the recent window of the kv cache");
        }
        ggml_backend_buffer_clear(made->buf.get(), 0);
    }
    LLAMA_LOG_INFO("llama_kv_cache: recent window: the last %u tokens and the first %u of each sequence in f16, %.2f MiB\n",
        sizes.recent, sizes.sinks, bytes/1024.0/1024.0);
    return made;
}

// ---- graphs ----

ggml_tensor * llama_turbo_window::ring(ggml_context * ctx, uint32_t layer, uint32_t first, uint32_t n) const {
    ggml_tensor * r = rings[layer];
    return ggml_view_4d(ctx, r, r->ne[0], r->ne[1], 1, n, r->nb[1], r->nb[2], r->nb[2], first*r->nb[2]);
}

static ggml_tensor * store(ggml_context * ctx, ggml_tensor * ring, int64_t channel, ggml_tensor * x, ggml_tensor * rows) {
    const int64_t channels = x->ne[0]*x->ne[1];
    ggml_tensor * all   = ggml_view_2d(ctx, ring, channels, ring->ne[1]*ring->ne[2], ring->nb[1], channel*ring->nb[0]);
    ggml_tensor * batch = ggml_view_2d(ctx, x, channels, x->ne[2], x->nb[2], 0);
    return ggml_set_rows(ctx, all, batch, rows);
}

ggml_tensor * llama_turbo_window::store_k(ggml_context * ctx, uint32_t layer, ggml_tensor * k, ggml_tensor * rows) const {
    return store(ctx, rings[layer], 0, k, rows);
}

ggml_tensor * llama_turbo_window::store_v(ggml_context * ctx, uint32_t layer, ggml_tensor * v, ggml_tensor * rows) const {
    return store(ctx, rings[layer], size_k[layer], v, rows);
}

// ---- what is in the ring ----

void llama_turbo_window::written(const std::vector<place> & places) {
    for (const place & p : places) {
        ++versions[p.stream][p.cell];
    }
}

void llama_turbo_window::copy(uint32_t from, uint32_t to) {
    for (ggml_tensor * r : rings) {
        memcpy((char *) r->data + to*r->nb[2], (const char *) r->data + from*r->nb[2], r->nb[2]);
    }
    entries[to]  = entries[from];
    versions[to] = versions[from];
}

void llama_turbo_window::forget(uint32_t stream) {
    for (uint32_t slot = 0; slot < n_slots; ++slot) {
        entries[stream][slot].pos = -1;
    }
}

bool llama_turbo_window::sees(llama_pos query, llama_pos key) const {
    return key < (llama_pos) sizes.sinks || std::abs(query - key) < (llama_pos) sizes.recent;
}

bool llama_turbo_window::is_valid(const entry & e, uint32_t stream, const llama_kv_cells & cells) const {
    return e.pos >= 0 && e.version == versions[stream][e.cell] && !cells.is_empty(e.cell) && cells.pos_get(e.cell) == e.pos;
}

uint32_t llama_turbo_window::slot_of(llama_pos pos, uint32_t seq) const {
    const uint32_t p = (uint32_t) pos;
    return seq*n_seq_slots + (p < sizes.sinks ? p : sizes.sinks + p % (sizes.recent + TAKEN_BACK));
}

void llama_turbo_window::spoil(uint32_t stream, uint32_t slot) const {
    for (ggml_tensor * r : rings) {
        ggml_fp16_t * row = (ggml_fp16_t *) ((char *) r->data + slot*r->nb[1] + stream*r->nb[2]);
        std::fill_n(row, r->ne[0], ggml_fp32_to_fp16(30000.0f));
    }
}

void llama_turbo_window::set_inputs(
        const std::vector<place> & places, const llama_ubatch & ubatch, const std::vector<llama_kv_cells> & cells,
        const ggml_tensor * mask, ggml_tensor * window_mask, ggml_tensor * columns, ggml_tensor * rows) {
    const int64_t n_streams = mask->ne[3], n_queries = places.size()/n_streams;

    struct candidate { // a key that is at hand in full precision
        uint32_t  cell, column;
        llama_pos pos;
    };
    std::vector<candidate> candidates;
    for (int64_t s = 0; s < n_streams; ++s) {
        const int64_t  first  = s*n_queries;
        const uint32_t stream = places[first].stream;
        candidates.clear();
        for (uint32_t slot = 0; slot + 1 < n_slots; ++slot) {
            entry & e = entries[stream][slot];
            if (is_valid(e, stream, cells[stream])) {
                if (e.cell < mask->ne[0]) {
                    candidates.push_back({ e.cell, slot, e.pos });
                }
            } else {
                e.pos = -1;
                if (poison) {
                    spoil(stream, slot);
                }
            }
        }
        for (int64_t i = 0; i < n_queries; ++i) {
            candidates.push_back({ places[first + i].cell, n_slots + (uint32_t) i, ubatch.pos[first + i] });
        }
        int32_t * column_of = (int32_t *) ((char *) columns->data + s*columns->nb[3]);
        std::fill_n(column_of, columns->ne[0], -1);
        for (const candidate & c : candidates) {
            column_of[c.cell] = c.column;
        }
        for (int64_t i = 0; i < n_queries; ++i) {
            const ggml_fp16_t * of_cache  = (const ggml_fp16_t *) ((const char *) mask->data + i*mask->nb[1] + s*mask->nb[3]);
            ggml_fp16_t *       of_window = (ggml_fp16_t *) ((char *) window_mask->data + i*window_mask->nb[1] + s*window_mask->nb[3]);
            std::fill_n(of_window, window_mask->ne[0], MASKED);
            for (const candidate & c : candidates) {
                if (sees(ubatch.pos[first + i], c.pos)) {
                    of_window[c.column] = of_cache[c.cell];
                }
            }
        }
    }

    int64_t * row = (int64_t *) rows->data;
    std::vector<int64_t> kept; // by stream of the batch and slot: the last token that goes there
    for (int64_t s = 0; s < n_streams; ++s) {
        const uint32_t stream = places[s*n_queries].stream;
        kept.assign(n_slots, -1);
        for (int64_t i = s*n_queries; i < (s + 1)*n_queries; ++i) {
            const uint32_t seq = entries.size() == 1 ? ubatch.seq_id[i][0] : 0;
            kept[slot_of(ubatch.pos[i], seq)] = i;
            row[i] = (int64_t) stream*n_slots + n_slots - 1;
        }
        for (uint32_t slot = 0; slot + 1 < n_slots; ++slot) {
            if (const int64_t i = kept[slot]; i >= 0) {
                row[i] = (int64_t) stream*n_slots + slot;
                entries[stream][slot] = { places[i].cell, versions[stream][places[i].cell], ubatch.pos[i] };
            }
        }
    }
}
