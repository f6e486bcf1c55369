// The calibration of the keys as a stranger's file may have it. Loading it throws std::exception, or gives vectors that fit
// the model and that it can be run with.

#include "fuzz.h"
#include "tiny-model.h"

#include "llama-model.h"
#include "llama/turbo-calibration.h"

#include <exception>

namespace {

const char * const KEYS[] = {
    "turboquant.keys.version", "turboquant.keys.context", "turboquant.keys.sizes", "turboquant.keys.center", "turboquant.keys.scale",
    "turboquant.keys.turned",  "turboquant.values.version",
};

using gguf_ptr = std::unique_ptr<gguf_context, decltype(&gguf_free)>;

gguf_ptr make() {
    return gguf_ptr(gguf_init_empty(), gguf_free);
}

class metadata : public fuzz_target {
public:
    metadata() {
        llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
        const gguf_ptr whole = make();
        tiny_metadata(whole.get());
        model = tiny_model(whole.get());
        expect(model != nullptr, "the tiny model could not be made");
        for (bool turned : { false, true }) {
            tiny_calibration(whole.get(), turned);
            expect(load(whole.get()), "a good calibration was refused");
        }
    }

    void run(fuzz_random & random) override {
        gguf_ptr file = make();
        const bool is_whole = random.one_in(128);
        if (is_whole) {
            tiny_metadata(file.get());
        }
        tiny_calibration(file.get(), random.one_in(2));
        for (uint64_t n = 1 + random.below(3); n > 0; --n) {
            change(random, file.get());
        }
        if (random.one_in(8)) {
            file = through_bytes(random, file.get());
        }
        if (!file) {
            ++not_read;
            return;
        }
        const bool is_good = load(file.get());
        ++(is_good ? loaded : refused);
        if (is_whole) {
            run_model(file.get(), is_good);
        }
    }

    std::string summary() const override {
        return std::to_string(loaded) + " loaded, " + std::to_string(refused) + " refused, " + std::to_string(not_read)
            + " not read by llama.cpp, " + std::to_string(models) + " models run";
    }

private:
    llama_model_ptr model;
    uint64_t loaded = 0, refused = 0, not_read = 0, models = 0;

    bool load(const gguf_context * file) {
        std::shared_ptr<const llama_turbo_calibration> made;
        try {
            made = llama_turbo_calibration::load(file, *model);
        } catch (const std::exception & error) {
            expect(*error.what(), "a refusal without a reason");
            return false;
        }
        if (!made) {
            return true; // not calibrated
        }
        expect(made->layers.size() == TINY_LAYERS && made->hash % 2 == 1, "a calibration of other layers was loaded");
        for (const auto & layer : made->layers) {
            expect(layer.scale.empty() || layer.scale.size() == TINY_HEAD_SIZE, "a calibration of other heads was loaded");
            expect(layer.center.empty() || layer.center.size() == layer.scale.size(), "centres and scales do not fit each other");
            expect(layer.n_turned == 0 || (layer.n_turned == TINY_HEAD_SIZE && !layer.center.empty()), "a centre turns that is none");
            for (size_t i = 0; i < layer.scale.size(); ++i) {
                expect(layer.scale[i] > 0 && std::isfinite(1/layer.scale[i]) && std::isfinite(layer.scale[i]), "a scale is useless");
                expect(layer.center.empty() || std::isfinite(layer.center[i]), "a centre is not finite");
            }
        }
        return true;
    }

    // A model with this metadata: refused, or it can be run.
    void run_model(gguf_context * file, bool is_good) {
        const llama_model_ptr made = tiny_model(file);
        if (!made) {
            return;
        }
        expect(is_good, "a model was loaded although its calibration is refused");
        llama_context_params params = llama_context_default_params();
        params.n_ctx = 256, params.n_batch = params.n_ubatch = 32, params.n_threads = params.n_threads_batch = 1;
        params.type_k = GGML_TYPE_TURBO4, params.type_v = GGML_TYPE_TURBO3;
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
        const llama_context_ptr context(llama_init_from_model(made.get(), params));
        expect(context != nullptr, "a loaded model has no context");
        std::vector<llama_token> tokens = { 1, 2, 3, 4 };
        expect(llama_decode(context.get(), llama_batch_get_one(tokens.data(), (int32_t) tokens.size())) == 0, "a loaded model cannot be run");
        const float * logits = llama_get_logits_ith(context.get(), -1);
        for (int32_t i = 0; i < TINY_VOCABULARY; ++i) {
            expect(std::isfinite(logits[i]), "a loaded model has logits that are not finite");
        }
        ++models;
    }

    // ---- changes ----

    template <typename T>
    static void set_array(gguf_context * file, const char * key, gguf_type type, const std::vector<T> & values) {
        gguf_set_arr_data(file, key, type, values.data(), values.size());
    }

    template <typename T>
    static std::vector<T> array(const gguf_context * file, const char * key, gguf_type type) {
        const int64_t id = gguf_find_key(file, key);
        if (id < 0 || gguf_get_kv_type(file, id) != GGUF_TYPE_ARRAY || gguf_get_arr_type(file, id) != type) {
            return {};
        }
        const T * data = (const T *) gguf_get_arr_data(file, id);
        return { data, data + gguf_get_arr_n(file, id) };
    }

    static void set_any(fuzz_random & random, gguf_context * file, const char * key) {
        const uint64_t n = random.hostile_integer();
        const float    f = random.hostile_float();
        switch (random.below(12)) {
            case 0:  gguf_set_val_u8  (file, key, (uint8_t) n); break;
            case 1:  gguf_set_val_i16 (file, key, (int16_t) n); break;
            case 2:  gguf_set_val_u32 (file, key, (uint32_t) n); break;
            case 3:  gguf_set_val_i32 (file, key, (int32_t) n); break;
            case 4:  gguf_set_val_u64 (file, key, n); break;
            case 5:  gguf_set_val_f32 (file, key, f); break;
            case 6:  gguf_set_val_f64 (file, key, f); break;
            case 7:  gguf_set_val_bool(file, key, n % 2); break;
            case 8:  gguf_set_val_str (file, key, random.pick({ "", "1", "2", "-1", "turbo" })); break;
            case 9: {
                std::vector<const char *> texts(random.below(4), "1");
                gguf_set_arr_str(file, key, texts.data(), texts.size());
                break;
            }
            case 10: set_array(file, key, GGUF_TYPE_FLOAT64, std::vector<double>(random.below(300), f)); break;
            default: set_array(file, key, GGUF_TYPE_UINT8,   std::vector<uint8_t>(random.below(300), (uint8_t) n)); break;
        }
    }

    // The length changes, or some of the values; or both halves of a scale, so that their mean stays what it should be.
    static void change_floats(fuzz_random & random, gguf_context * file, const char * key) {
        std::vector<float> values = array<float>(file, key, GGUF_TYPE_FLOAT32);
        if (random.one_in(3)) {
            values.resize(random.pick({ (uint64_t) 0, (uint64_t) 63, (uint64_t) 64, (uint64_t) 127, (uint64_t) 129, random.below(400) }), 1.0f);
        } else if (values.size() > 1 && random.one_in(2)) {
            const float factor = random.one_in(2) ? std::exp(8*random.gaussian()) : random.hostile_float();
            const size_t i = random.below(values.size() - 1);
            values[i] *= factor, values[i + 1] /= factor;
        } else {
            for (uint64_t n = values.empty() ? 0 : 1 + random.below(3); n > 0; --n) {
                values[random.below(values.size())] = random.hostile_float();
            }
        }
        set_array(file, key, GGUF_TYPE_FLOAT32, values);
    }

    static void change_sizes(fuzz_random & random, gguf_context * file, const char * key) {
        std::vector<int32_t> sizes = array<int32_t>(file, key, GGUF_TYPE_INT32);
        if (sizes.empty() || random.one_in(4)) {
            sizes.resize(random.below(5), TINY_HEAD_SIZE);
        } else {
            sizes[random.below(sizes.size())] = random.one_in(2)
                ? random.pick({ 0, -1, 63, 64, 65, 128, INT32_MIN, INT32_MAX, -64 }) : (int32_t) random.hostile_integer();
        }
        set_array(file, key, GGUF_TYPE_INT32, sizes);
    }

    static void change(fuzz_random & random, gguf_context * file) {
        const char * key = random.of(KEYS);
        switch (random.below(8)) {
            case 0:  set_any(random, file, key); break;
            case 1:  gguf_remove_key(file, key); break;
            case 2:  gguf_set_val_u32(file, KEYS[random.below(2)], (uint32_t) random.hostile_integer()); break;
            case 3:
            case 4:  change_sizes(random, file, KEYS[random.one_in(2) ? 2 : 5]); break;
            case 5:  change_floats(random, file, KEYS[3]); break;
            default: change_floats(random, file, KEYS[4]); break;
        }
        if (random.one_in(64) && gguf_get_n_tensors(file) == 0) { // sinks, with which keys are not centred
            ggml_context_ptr ctx(ggml_init({ ggml_tensor_overhead(), nullptr, true }));
            ggml_tensor * sinks = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, TINY_HEADS);
            ggml_set_name(sinks, "blk.0.attn_sinks.weight");
            gguf_add_tensor(file, sinks);
        }
    }

    // As a file, of which two keys may have one name. Null if llama.cpp does not read it. Other bytes are not changed: upstream
    // loads the number of a type as an enum before it looks whether it is one (gguf_init_from_reader), which is a report.
    static gguf_ptr through_bytes(fuzz_random & random, const gguf_context * file) {
        fuzz_bytes bytes(gguf_get_meta_size(file));
        gguf_get_meta_data(file, bytes.data());
        const std::string text((char *) bytes.data(), bytes.size());
        const size_t at = text.find("keys.sizes");
        if (at != std::string::npos && random.one_in(4)) {
            memcpy(bytes.data() + at, "keys.scale", 10);
        }
        return gguf_ptr(gguf_init_from_buffer(bytes.data(), bytes.size(), { true, nullptr }), gguf_free);
    }
};

} // namespace

std::unique_ptr<fuzz_target> fuzz_metadata() {
    return std::make_unique<metadata>();
}
