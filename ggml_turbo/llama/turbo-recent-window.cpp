#include "turbo-recent-window.h"

#include "ggml-turbo.h"
#include "llama-batch.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cells.h"
#include "ops/turbo-window.h"
#include "turbo-cache-types.h"
#include "turbo-settings.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <numeric>
#include <stdexcept>
#include <tuple>

static const ggml_fp16_t MASKED = ggml_fp32_to_fp16(-INFINITY);

// Tokens that can be taken back, as rejected drafts are, and the windows before them are still whole: as many as
// llama-server drafts by default in one sequence, or a few in each.
static const uint32_t TAKEN_BACK = 64, TAKEN_BACK_OF_EACH = 16;

// By default: a part of what a sequence can have, so that what a longer context loses does not grow with it. It takes a
// quarter of a bit a value (docs/recent-window.md).
static const uint32_t CONTEXT_PART = 64, SHORTEST = 64, LONGEST = 1024;

llama_turbo_window::size llama_turbo_window::size::wanted(ggml_type type_k, ggml_type type_v, uint32_t cells) {
    const llama_turbo_params & said = llama_turbo_taken_params();
    const int32_t share = std::clamp(cells/CONTEXT_PART, SHORTEST, LONGEST);
    const int32_t usual = turbo_is_type(type_k) || turbo_is_type(type_v) ? share : 0;
    return { uint32_t(said.cache_window != LLAMA_TURBO_UNSAID ? said.cache_window : usual), uint32_t(said.cache_sinks) };
}

// Whether a device has a kernel of the operator for a layer. Some say yes to every custom operator without a look at it (RPC,
// whose server cannot know ours), so one is asked about that nobody knows.
static bool takes_operator(ggml_backend_dev_t device, const llama_turbo_window::cache & c) {
    ggml_context_ptr ctx(ggml_init({ 16*ggml_tensor_overhead(), nullptr, true }));
    const auto tensor = [&ctx](ggml_type type, int64_t n0, int64_t n1 = 1, int64_t n2 = 1) {
        return ggml_new_tensor_3d(ctx.get(), type, n0, n1, n2);
    };
    const int64_t n_kv = 256, n_slots = 64, n_tokens = 1, n_tiles = 8;
    ggml_tensor * sources[TURBO_WINDOW_SOURCES];
    sources[TURBO_WINDOW_Q]       = tensor(GGML_TYPE_F32, c.head_size_k + n_tiles, n_tokens, c.n_heads);
    sources[TURBO_WINDOW_K]       = tensor(c.k->type, c.head_size_k, n_kv, c.n_kv_heads);
    sources[TURBO_WINDOW_V]       = tensor(c.v->type, c.head_size_v, n_kv, c.n_kv_heads);
    sources[TURBO_WINDOW_MASK]    = tensor(GGML_TYPE_F16, n_kv, n_tokens);
    sources[TURBO_WINDOW_SINKS]   = tensor(GGML_TYPE_F32, c.n_heads);
    sources[TURBO_WINDOW_RING]    = tensor(GGML_TYPE_F16, c.k->ne[0] + c.v->ne[0], n_slots);
    sources[TURBO_WINDOW_NEW_K]   = tensor(GGML_TYPE_F32, c.head_size_k, n_tokens, c.n_kv_heads);
    sources[TURBO_WINDOW_NEW_V]   = tensor(GGML_TYPE_F32, c.head_size_v, n_tokens, c.n_kv_heads);
    sources[TURBO_WINDOW_MASK_W]  = tensor(GGML_TYPE_F16, n_slots + n_tokens, n_tokens);
    sources[TURBO_WINDOW_COLUMNS] = tensor(GGML_TYPE_I32, n_kv + n_kv + n_slots + n_tokens);
    ggml_tensor * known = turbo_window_attention(ctx.get(), sources, 1.0f, 0.0f, 0.0f);
    const auto nothing = [](ggml_tensor *, int, int, void *) {};
    ggml_tensor * unknown = ggml_custom_4d(
        ctx.get(), known->type, known->ne[0], known->ne[1], known->ne[2], known->ne[3], sources, TURBO_WINDOW_RING, nothing, 1, nullptr);
    return ggml_backend_dev_supports_op(device, known) && !ggml_backend_dev_supports_op(device, unknown);
}

std::string llama_turbo_window::reason_against(const std::vector<cache> & caches, bool v_trans) {
    if (v_trans) {
        return "it needs flash attention";
    }
    for (const cache & c : caches) {
        if (!c.v) {
            return "values are part of the keys (MLA)";
        }
        if (c.head_size_k % QK_TURBO != 0 || c.head_size_v % QK_TURBO != 0) {
            return "its kernel takes head sizes that are multiples of 64";
        }
        ggml_backend_dev_t device = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(c.k->buffer));
        if (ggml_backend_buffer_is_host(c.k->buffer) && (!device || ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU)) {
            continue;
        }
        if (!device || ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_META) {
            return "the cache is split between devices";
        }
        if (!takes_operator(device, c)) {
            return format("the cache (keys of %s, values of %s, heads of %u and %u) is on %s, %s, which has no kernel for it",
                ggml_type_name(c.k->type), ggml_type_name(c.v->type), c.head_size_k, c.head_size_v, ggml_backend_dev_name(device),
                ggml_backend_dev_description(device));
        }
    }
    return {};
}

std::shared_ptr<llama_turbo_window> llama_turbo_window::make(
        const std::vector<cache> & caches, ggml_type type_k, ggml_type type_v, bool v_trans, uint32_t n_stream, uint32_t n_seq,
        bool no_alloc, bool is_needed) {
    const bool is_quantized = ggml_is_quantized(type_k) || ggml_is_quantized(type_v);
    const uint32_t cells = caches.empty() ? 0 : caches[0].k->ne[1];
    size sizes = is_quantized ? size::wanted(type_k, type_v, cells/n_seq) : size { 0, 0 };
    if (!(sizes.recent || is_needed) || caches.empty()) {
        return nullptr;
    }
    if (const std::string reason = reason_against(caches, v_trans); !reason.empty()) {
        LLAMA_LOG_WARN("llama_kv_cache: no recent window: %s\n", reason.c_str());
        return nullptr;
    }

    sizes = { std::min(sizes.recent, cells), sizes.recent ? std::min(sizes.sinks, cells) : 0 };

    // As much as all sequences want, within what the cache saves against one in f16.
    size_t cell_bytes = 0, f16_bytes = 0;
    for (const cache & c : caches) {
        cell_bytes += c.k->nb[1] + c.v->nb[1];
        f16_bytes  += (c.k->ne[0] + c.v->ne[0])*sizeof(ggml_fp16_t);
    }
    const uint64_t wanted = (uint64_t) n_seq*(sizes.sinks + sizes.recent) + std::max(TAKEN_BACK, n_seq*TAKEN_BACK_OF_EACH);
    const uint64_t saved  = cell_bytes < f16_bytes ? cells*(f16_bytes - cell_bytes)/f16_bytes : 0;
    if (sizes.recent && saved <= sizes.sinks + 1) {
        LLAMA_LOG_WARN("llama_kv_cache: no recent window: a cache of %u tokens saves too little memory to make room for one\n", cells);
        if (!is_needed) {
            return nullptr;
        }
        sizes = { 0, 0 };
    }

    auto made = std::make_shared<llama_turbo_window>();
    made->sizes   = sizes;
    made->n_slots = sizes.recent ? std::min<uint64_t>(wanted + 1, saved) : 1;
    made->poison  = getenv("TURBO_WINDOW_POISON") != nullptr;
    made->versions.assign(n_stream, std::vector<uint32_t>(cells, 0));
    made->entries.assign(n_stream, std::vector<entry>(made->n_slots - 1));
    for (uint32_t stream = 0; stream < n_stream; ++stream) {
        for (uint32_t slot = 0; slot + 1 < made->n_slots; ++slot) {
            const llama_seq_id seq = n_stream > 1 ? stream : (uint64_t) slot*n_seq/made->n_slots;
            made->entries[stream][slot] = { 0, 0, -1, false, seq };
        }
    }

    std::map<ggml_backend_buffer_type_t, ggml_context_ptr> contexts;
    size_t bytes = 0;
    for (const cache & c : caches) {
        ggml_context_ptr & ctx = contexts[ggml_backend_buffer_get_type(c.k->buffer)];
        if (!ctx) {
            ctx.reset(ggml_init({ caches.size()*ggml_tensor_overhead(), nullptr, true }));
        }
        ggml_tensor * t = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F16, c.k->ne[0] + c.v->ne[0], made->n_slots, n_stream);
        ggml_format_name(t, "%s_window", c.k->name);
        made->rings.push_back(t);
        made->size_k.push_back(c.k->ne[0]);
        bytes += ggml_nbytes(t);
    }
    for (auto & [buft, ctx] : contexts) {
        ggml_backend_buffer_ptr buf;
        if (no_alloc) {
            buf.reset(ggml_backend_buft_alloc_buffer(buft, 0));
            for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t; t = ggml_get_next_tensor(ctx.get(), t)) {
                t->buffer = buf.get();
            }
        } else {
            buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));
            if (!buf) {
                throw std::runtime_error(format("failed to allocate the recent window of the kv cache in %s", ggml_backend_buft_name(buft)));
            }
            ggml_backend_buffer_clear(buf.get(), 0);
        }
        made->memories.emplace_back(std::move(ctx), std::move(buf));
    }
    if (!sizes.recent) {
        return made;
    }
    LLAMA_LOG_INFO("llama_kv_cache: recent window: the last %u tokens and the first %u of each sequence in f16, %.2f MiB (room for %u tokens)\n",
        sizes.recent, sizes.sinks, bytes/1024.0/1024.0, n_stream*(made->n_slots - 1));
    if ((uint64_t) n_seq*(sizes.sinks + sizes.recent) >= made->n_slots) {
        LLAMA_LOG_WARN("llama_kv_cache: recent window: it is shorter while all of %u sequences are in use, since more room would take more "
            "memory than an f16 cache: a longer context makes room\n", n_seq);
    }
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
    ggml_context_ptr ctx(ggml_init({ 2*rings.size()*ggml_tensor_overhead(), nullptr, true }));
    for (ggml_tensor * r : rings) {
        const auto of_stream = [&ctx, r](uint32_t stream) {
            ggml_tensor * view = ggml_view_2d(ctx.get(), r, r->ne[0], r->ne[1], r->nb[1], stream*r->nb[2]);
            ggml_backend_view_init(view);
            return view;
        };
        ggml_backend_tensor_copy(of_stream(from), of_stream(to));
    }
    entries[to]  = entries[from];
    versions[to] = versions[from];
}

// Whether a token that arrives is one of the first of its sequence, which all later ones need. It is one for as long as it is
// kept: what lies before it may leave the cache, as in a sliding window, and what comes after is no first token for that.
bool llama_turbo_window::is_sink(const llama_kv_cells & cells, const arrival & a) const {
    return cells.pos_get(a.cell) - cells.seq_pos_min(a.seq) < (llama_pos) sizes.sinks;
}

bool llama_turbo_window::is_valid(const entry & e, uint32_t stream, const llama_kv_cells & cells) const {
    return e.pos >= 0 && e.version == versions[stream][e.cell] && !cells.is_empty(e.cell) && cells.pos_get(e.cell) == e.pos;
}

// How many tokens the sequence has had since that needs this cell most; -1: all need it.
llama_pos llama_turbo_window::age(const llama_kv_cells & cells, const arrival & a, bool is_sink) const {
    if (is_sink) {
        return -1;
    }
    const auto [cell, seq] = a;
    const llama_pos pos = cells.pos_get(cell);
    if (cells.seq_count(cell) == 1 && cells.seq_has(cell, seq)) {
        return cells.seq_pos_max(seq) - pos;
    }
    llama_pos youngest = INT32_MAX;
    for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
        if (cells.seq_has(cell, s)) {
            youngest = std::min(youngest, cells.seq_pos_max(s) - pos);
        }
    }
    return youngest;
}

// Decides what the ring holds from now on: the youngest of what it has and of what arrives. The slot of each arrival; the
// last one for those that are not kept.
std::vector<uint32_t> llama_turbo_window::admit(uint32_t stream, const llama_kv_cells & cells, const std::vector<arrival> & arrivals) {
    std::vector<entry> & slots = entries[stream];

    struct token {
        llama_pos age;
        bool      is_here;
        uint32_t  index; // of the slot, or of the arrival
        bool operator<(const token & other) const {
            return std::tie(age, is_here, index) < std::tie(other.age, other.is_here, other.index);
        }
    };
    std::vector<token> tokens;
    for (uint32_t slot = 0; slot < slots.size(); ++slot) {
        if (is_valid(slots[slot], stream, cells)) {
            tokens.push_back({ age(cells, { slots[slot].cell, slots[slot].seq }, slots[slot].is_sink), true, slot });
        }
    }
    // An image has hundreds of tokens at one position, which must not fill the ring as first ones.
    std::map<llama_seq_id, uint32_t> n_sinks;
    std::vector<bool> is_first(arrivals.size());
    for (uint32_t i = 0; i < arrivals.size(); ++i) {
        if (is_sink(cells, arrivals[i])) {
            const auto [n, is_new] = n_sinks.try_emplace(arrivals[i].seq);
            if (is_new) {
                n->second = std::count_if(slots.begin(), slots.end(), [&](const entry & e) {
                    return e.is_sink && is_valid(e, stream, cells) && cells.seq_has(e.cell, arrivals[i].seq);
                });
            }
            is_first[i] = n->second++ < sizes.sinks;
        }
        tokens.push_back({ age(cells, arrivals[i], is_first[i]), false, i });
    }
    if (tokens.size() > slots.size()) {
        std::nth_element(tokens.begin(), tokens.begin() + slots.size(), tokens.end());
        tokens.resize(slots.size());
    }

    std::vector<bool> is_free(slots.size(), true), is_kept(arrivals.size(), false);
    for (const token & t : tokens) {
        if (t.is_here) {
            is_free[t.index] = false;
        } else {
            is_kept[t.index] = true;
        }
    }
    // A sequence's tokens should lie side by side, which attention reads faster: first what was the sequence's own.
    std::map<llama_seq_id, std::vector<uint32_t>> free_of; // from the last slot to the first
    for (uint32_t slot = slots.size(); slot-- > 0;) {
        if (is_free[slot]) {
            free_of[slots[slot].seq].push_back(slot);
        }
    }
    std::vector<uint32_t> found(arrivals.size(), n_slots - 1);
    const auto give = [&](uint32_t i, std::vector<uint32_t> & from) {
        const uint32_t slot = from.back(), cell = arrivals[i].cell;
        from.pop_back();
        slots[slot] = { cell, versions[stream][cell], cells.pos_get(cell), is_first[i], arrivals[i].seq };
        found[i]    = slot;
        is_kept[i]  = false;
    };
    for (uint32_t i = 0; i < arrivals.size(); ++i) {
        const auto own = free_of.find(arrivals[i].seq);
        if (is_kept[i] && own != free_of.end() && !own->second.empty()) {
            give(i, own->second);
        }
    }
    auto others = free_of.begin();
    for (uint32_t i = 0; i < arrivals.size(); ++i) {
        if (is_kept[i]) {
            while (others->second.empty()) {
                ++others;
            }
            give(i, others->second);
        }
    }
    return found;
}

void llama_turbo_window::spoil(uint32_t stream, uint32_t slot) const {
    for (ggml_tensor * r : rings) {
        const std::vector<ggml_fp16_t> row(r->ne[0], ggml_fp32_to_fp16(30000.0f));
        ggml_backend_tensor_set(r, row.data(), slot*r->nb[1] + stream*r->nb[2], r->nb[1]);
    }
}

void llama_turbo_window::set_inputs(
        const std::vector<place> & places, const llama_ubatch & ubatch, const std::vector<llama_kv_cells> & cells,
        const ggml_tensor * mask, ggml_tensor * window_mask, ggml_tensor * columns, ggml_tensor * rows, bool stores) {
    const int64_t n_streams = mask->ne[3], n_queries = places.size()/n_streams;

    struct candidate { // a key that is at hand in full precision
        uint32_t  cell, column;
        llama_pos pos;
        bool      is_sink;
    };
    std::vector<candidate> candidates;
    for (int64_t s = 0; s < n_streams; ++s) {
        const int64_t  first  = s*n_queries;
        const uint32_t stream = places[first].stream;
        candidates.clear();
        for (uint32_t slot = 0; slot < entries[stream].size(); ++slot) {
            entry & e = entries[stream][slot];
            if (is_valid(e, stream, cells[stream])) {
                if (e.cell < mask->ne[0]) {
                    candidates.push_back({ e.cell, slot, e.pos, e.is_sink });
                }
            } else {
                e.pos = -1;
                if (poison) {
                    spoil(stream, slot);
                }
            }
        }
        for (int64_t i = 0; i < n_queries && sizes.recent; ++i) {
            const arrival a = { places[first + i].cell, ubatch.seq_id[first + i][0] };
            candidates.push_back({ a.cell, n_slots + (uint32_t) i, ubatch.pos[first + i], is_sink(cells[stream], a) });
        }
        int32_t * column_of = (int32_t *) ((char *) columns->data + s*columns->nb[3]);
        std::fill_n(column_of, mask->ne[0], -1);
        for (const candidate & c : candidates) {
            column_of[c.cell] = c.column;
        }
        for (int64_t i = 0; i < n_queries; ++i) {
            const ggml_fp16_t * of_cache  = (const ggml_fp16_t *) ((const char *) mask->data + i*mask->nb[1] + s*mask->nb[3]);
            ggml_fp16_t *       of_window = (ggml_fp16_t *) ((char *) window_mask->data + i*window_mask->nb[1] + s*window_mask->nb[3]);
            std::fill_n(of_window, window_mask->ne[0], MASKED);
            for (const candidate & c : candidates) {
                if (c.is_sink || std::abs(ubatch.pos[first + i] - c.pos) < (llama_pos) sizes.recent) {
                    of_window[c.column] = of_cache[c.cell];
                }
            }
        }
    }

    int64_t * row = (int64_t *) rows->data;
    std::vector<arrival> arrivals;
    for (int64_t s = 0; s < n_streams; ++s) {
        const uint32_t stream = places[s*n_queries].stream;
        arrivals.clear();
        for (int64_t i = s*n_queries; stores && i < (s + 1)*n_queries; ++i) {
            arrivals.push_back({ places[i].cell, ubatch.seq_id[i][0] });
        }
        std::vector<uint32_t> slots = admit(stream, cells[stream], arrivals);
        slots.resize(n_queries, n_slots - 1);
        for (uint32_t slot : slots) {
            *row++ = (int64_t) stream*n_slots + slot;
        }
    }
}

// ---- saved states ----

size_t llama_turbo_window::token_bytes() const {
    return std::accumulate(rings.begin(), rings.end(), (size_t) 0, [](size_t sum, const ggml_tensor * r) { return sum + r->nb[1]; });
}

void llama_turbo_window::save(
        llama_io_write_i & io, uint32_t stream, const std::vector<uint32_t> & saved, const llama_kv_cells & cells) const {
    std::map<uint32_t, uint32_t> slot_of; // by cell: of what a next token would see
    for (uint32_t slot = 0; slot < entries[stream].size(); ++slot) {
        const entry & e = entries[stream][slot];
        if (is_valid(e, stream, cells) && age(cells, { e.cell, e.seq }, e.is_sink) < (llama_pos) sizes.recent) {
            slot_of[e.cell] = slot;
        }
    }
    std::vector<uint32_t> indices, slots; // in the order of the saved cells
    for (uint32_t i = 0; i < saved.size(); ++i) {
        if (const auto it = slot_of.find(saved[i]); it != slot_of.end()) {
            indices.push_back(i);
            slots.push_back(it->second);
        }
    }
    const uint32_t n     = indices.size();
    const uint64_t bytes = token_bytes();
    io.write(&n,     sizeof(n));
    io.write(&bytes, sizeof(bytes));
    if (n > 0) {
        io.write(indices.data(), n*sizeof(indices[0]));
    }
    for (ggml_tensor * r : rings) {
        for (uint32_t slot : slots) {
            io.write_tensor(r, slot*r->nb[1] + stream*r->nb[2], r->nb[1]);
        }
    }
}

// What stands before the rows: which of n_cells cells they are of. False if that cannot be.
static bool read_head(llama_io_read_i & io, size_t n_cells, std::vector<uint32_t> & indices, uint64_t & bytes) {
    uint32_t n;
    io.read(&n,     sizeof(n));
    io.read(&bytes, sizeof(bytes));
    if (n > n_cells) {
        return false;
    }
    indices.resize(n);
    if (n > 0) { // of none there is no address, and memcpy wants one
        io.read(indices.data(), n*sizeof(indices[0]));
    }
    for (uint32_t i = 0; i < n; ++i) {
        if (indices[i] >= n_cells || (i > 0 && indices[i] <= indices[i - 1])) {
            return false;
        }
    }
    return true;
}

bool llama_turbo_window::restore(
        llama_io_read_i & io, uint32_t stream, const std::vector<uint32_t> & restored, const llama_kv_cells & cells) {
    std::vector<uint32_t> indices;
    uint64_t bytes;
    if (!read_head(io, restored.size(), indices, bytes) || bytes != token_bytes()) {
        return false;
    }
    std::vector<arrival> arrivals;
    for (uint32_t i : indices) {
        const auto & sequences = cells.seq_get_all(restored[i]);
        llama_seq_id seq = 0;
        while (seq + 1 < LLAMA_MAX_SEQ && !sequences.test(seq)) {
            ++seq;
        }
        arrivals.push_back({ restored[i], seq });
    }
    const std::vector<uint32_t> slots = admit(stream, cells, arrivals);
    for (ggml_tensor * r : rings) {
        for (uint32_t slot : slots) {
            io.read_tensor(r, slot*r->nb[1] + stream*r->nb[2], r->nb[1]);
        }
    }
    return true;
}

bool llama_turbo_window::skip(llama_io_read_i & io, size_t n_cells) {
    std::vector<uint32_t> indices;
    uint64_t bytes;
    if (!read_head(io, n_cells, indices, bytes) || bytes > UINT32_MAX) {
        return false;
    }
    std::vector<uint8_t> piece(4096); // no room for what is said to be there, which need not be there
    for (uint64_t left = bytes*indices.size(); left > 0;) {
        const size_t n = std::min<uint64_t>(left, piece.size());
        io.read(piece.data(), n);
        left -= n;
    }
    return true;
}
