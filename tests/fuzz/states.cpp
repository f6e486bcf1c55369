// Saved states as a stranger, or another model, may have made them. Restoring one fails or succeeds; either way the context
// goes on, and once it has forgotten what was restored it computes what it did before.

#include "fuzz.h"
#include "tiny-model.h"

#include "llama/turbo-settings.h"

#include <algorithm>

namespace {

constexpr uint32_t SEQUENCES = 3;

struct kind {
    ggml_type    type_k, type_v;
    bool         is_calibrated, is_unified;
    int32_t      window;
};

const kind KINDS[] = {
    { GGML_TYPE_TURBO4, GGML_TYPE_TURBO3, false, true,  8 },
    { GGML_TYPE_TURBO4, GGML_TYPE_TURBO3, false, false, 8 },
    { GGML_TYPE_TURBO4, GGML_TYPE_TURBO3, true,  true,  8 },
    { GGML_TYPE_TURBO2, GGML_TYPE_TURBO2, true,  false, 8 },
    { GGML_TYPE_TURBO3, GGML_TYPE_TURBO4, true,  true,  0 },
    { GGML_TYPE_TURBO4, GGML_TYPE_TURBO3, false, true,  0 },
    { GGML_TYPE_Q8_0,   GGML_TYPE_TURBO3, false, false, 5 },
};

using bytes = std::vector<uint8_t>;

struct saved {
    bytes state;
    bool  is_whole; // of the context, not of one sequence
};

struct context {
    llama_context_ptr  llama;
    std::vector<saved> states; // the first is whole
    std::vector<float> logits; // of the first prompt in an empty context
};

int32_t decode(llama_context * ctx, llama_seq_id seq, llama_pos from, int32_t n) {
    llama_batch batch = llama_batch_init(n, 0, 1);
    batch.n_tokens = n;
    for (int32_t i = 0; i < n; ++i) {
        batch.token[i] = (from + 5*i + seq) % TINY_VOCABULARY;
        batch.pos[i] = from + i, batch.n_seq_id[i] = 1, batch.seq_id[i][0] = seq, batch.logits[i] = i + 1 == n;
    }
    const int32_t status = llama_decode(ctx, batch);
    llama_batch_free(batch);
    return status;
}

constexpr int32_t PROMPT = 20;

std::vector<float> prompt(llama_context * ctx) {
    expect(decode(ctx, 0, 0, PROMPT) == 0, "a context does not go on");
    const float * logits = llama_get_logits_ith(ctx, -1);
    return { logits, logits + TINY_VOCABULARY };
}

class states : public fuzz_target {
public:
    states() {
        llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
        for (bool is_calibrated : { false, true }) {
            const std::unique_ptr<gguf_context, decltype(&gguf_free)> metadata(gguf_init_empty(), gguf_free);
            tiny_metadata(metadata.get());
            if (is_calibrated) {
                tiny_calibration(metadata.get());
            }
            models.push_back(tiny_model(metadata.get()));
            expect(models.back() != nullptr, "the tiny model could not be made");
        }
        for (const kind & k : KINDS) {
            contexts.push_back(make(k));
        }
    }

    void run(fuzz_random & random) override {
        context & c = contexts[random.below(contexts.size())];
        llama_context * ctx = c.llama.get();
        const bytes & good = c.states[0].state;
        expect(llama_state_set_data(ctx, good.data(), good.size()) == good.size(), "a good state was refused");

        for (uint64_t n = 1 + random.below(2); n > 0; --n) {
            const saved & from = random.one_in(8) ? random.of(random.of(contexts).states) : random.of(c.states);
            restore(random, ctx, mutated(random, from), random.one_in(32) ? !from.is_whole : from.is_whole);
        }
        if (random.one_in(8)) {
            go_on(random, ctx);
        }
        if (random.one_in(32)) {
            forget(random, c);
        }
    }

    std::string summary() const override {
        return std::to_string(restored) + " restored, " + std::to_string(refused) + " refused, " + std::to_string(batches) + " batches after it";
    }

private:
    std::vector<llama_model_ptr> models;
    std::vector<context>         contexts;
    uint64_t restored = 0, refused = 0, batches = 0;

    context make(const kind & k) {
        llama_turbo_params window = llama_turbo_default_params();
        window.cache_window = k.window, window.cache_sinks = 2;
        expect(llama_turbo_set_next(&window), "the window was refused");
        llama_context_params params = llama_context_default_params();
        params.n_ctx = k.is_unified ? 256 : 256*SEQUENCES;
        params.n_seq_max = SEQUENCES, params.kv_unified = k.is_unified;
        params.n_batch = params.n_ubatch = 32, params.n_threads = params.n_threads_batch = 1;
        params.type_k = k.type_k, params.type_v = k.type_v;
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
        context c;
        c.llama.reset(llama_init_from_model(models[k.is_calibrated].get(), params));
        llama_context * ctx = c.llama.get();
        expect(ctx != nullptr, "a context could not be made");
        c.logits = prompt(ctx);
        expect(decode(ctx, 1, 0, 7) == 0 && decode(ctx, 1, 7, 1) == 0, "a context could not be filled");
        c.states.push_back({ bytes(llama_state_get_size(ctx)), true });
        expect(llama_state_get_data(ctx, c.states[0].state.data(), c.states[0].state.size()) == c.states[0].state.size(), "no state was saved");
        for (llama_seq_id seq : { 0, 1 }) {
            saved s = { bytes(llama_state_seq_get_size(ctx, seq)), false };
            expect(llama_state_seq_get_data(ctx, s.state.data(), s.state.size(), seq) == s.state.size(), "no state was saved");
            c.states.push_back(std::move(s));
        }
        return c;
    }

    // ---- changes ----

    void overwrite(fuzz_random & random, bytes & state) {
        const size_t size = random.one_in(2) ? 4 : 8;
        if (state.size() < size) {
            return;
        }
        // counts and sizes are at the beginning, and between the tensors
        const size_t at = random.one_in(2) ? random.below(std::min<size_t>(state.size() - size, 400) + 1) : random.below(state.size() - size + 1);
        uint64_t value = random.hostile_integer();
        if (random.one_in(4)) {
            value = random.pick({ 0x6d627274, 0x776e6469 }); // what marks the parts of a state that are ours
        }
        memcpy(state.data() + at, &value, size);
    }

    // Upstream makes room for a name of the length that a whole state says, of up to 4 GiB, before it looks whether it is there
    // (llama_io_read_i::read_string).
    void keep_length_of_architecture(fuzz_bytes & state) const {
        if (state.size() >= 4) {
            memcpy(state.data(), contexts[0].states[0].state.data(), 4);
        }
    }

    bytes mutated(fuzz_random & random, const saved & from) {
        bytes state = from.state;
        for (uint64_t n = random.below(4); n > 0 && !state.empty(); --n) {
            const size_t at = random.below(state.size()), length = std::min<size_t>(random.below(64), state.size() - at);
            switch (random.below(8)) {
                case 0: state.resize(at); break;
                case 1: state.erase(state.begin() + at, state.begin() + at + length); break;
                case 2: { // again what was there, or other bytes
                    bytes more(state.begin() + at, state.begin() + at + length);
                    if (random.one_in(2)) {
                        random.fill(more.data(), more.size());
                    }
                    state.insert(state.begin() + at, more.begin(), more.end());
                    break;
                }
                case 3: { // another state from here on
                    const bytes & other = random.of(random.of(contexts).states).state;
                    state.resize(at);
                    if (at < other.size()) {
                        state.insert(state.end(), other.begin() + at, other.end());
                    }
                    break;
                }
                case 4:
                    for (uint64_t flips = 1 + random.below(8); flips > 0; --flips) {
                        state[random.below(state.size())] ^= (uint8_t) (1 << random.below(8));
                    }
                    break;
                case 5: random.fill(state.data() + at, length); break;
                default: overwrite(random, state); break;
            }
        }
        return state;
    }

    // ---- what a context does with them ----

    void restore(fuzz_random & random, llama_context * ctx, const bytes & state, bool is_whole) {
        const llama_seq_id seq = (llama_seq_id) random.below(SEQUENCES);
        fuzz_bytes exact(state.size());
        std::copy(state.begin(), state.end(), exact.data());
        if (is_whole) {
            keep_length_of_architecture(exact);
        }
        const size_t read = is_whole ? llama_state_set_data(ctx, exact.data(), exact.size())
                                     : llama_state_seq_set_data(ctx, exact.data(), exact.size(), seq);
        expect(read <= state.size(), "more was read than there is");
        ++(read ? restored : refused);
    }

    void go_on(fuzz_random & random, llama_context * ctx) {
        llama_memory_t memory = llama_get_memory(ctx);
        const llama_seq_id seq = (llama_seq_id) random.below(SEQUENCES);
        const llama_pos    last = llama_memory_seq_pos_max(memory, seq);
        switch (random.below(6)) {
            case 0: llama_memory_seq_rm(memory, seq, last/2, -1); break;
            case 1: llama_memory_seq_add(memory, seq, 3, -1, 2); break;
            case 2: llama_memory_seq_cp(memory, seq, (seq + 1) % SEQUENCES, -1, -1); break;
            default: break;
        }
        const int32_t status = decode(ctx, seq, llama_memory_seq_pos_max(memory, seq) + 1, 1 + (int32_t) random.below(3));
        expect(status == 0 || status == 1, "a context does not go on after a state");
        ++batches;
        bytes again(llama_state_get_size(ctx));
        expect(llama_state_get_data(ctx, again.data(), again.size()) == again.size(), "a context cannot be saved after a state");
    }

    void forget(fuzz_random & random, context & c) {
        llama_memory_t memory = llama_get_memory(c.llama.get());
        if (random.one_in(2)) {
            llama_memory_clear(memory, random.one_in(2));
        } else {
            llama_memory_seq_rm(memory, -1, -1, -1);
        }
        const std::vector<float> logits = prompt(c.llama.get());
        for (int32_t i = 0; i < TINY_VOCABULARY; ++i) { // other cells, and so sums in another order
            expect(std::abs(logits[i] - c.logits[i]) <= 1e-2f, "what was forgotten changes what is computed");
        }
    }
};

} // namespace

std::unique_ptr<fuzz_target> fuzz_states() {
    return std::make_unique<states>();
}
