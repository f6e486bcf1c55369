#include "llama/turbo-calibration.h"

#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-model.h"
#include "turbo-centers.h"
#include "turbo-settings.h"

#include "gguf.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

static const std::string KEY = "turboquant.keys.";

// In files of version 1 no centre turns. Those that do not say what they were measured for were measured at positions 0 to
// 1023. That far again the gain is smaller; at 8192 it has become a loss (docs/calibration.md).
static const uint32_t CONTEXT_UNSAID = 2048;

// What the floors in calibration.py allow in a head of n channels: variances and squares from 1e-8 to n times their mean,
// a scale being the fourth root of a ratio of both, and 1 in the geometric mean.
static float largest_scale(uint32_t n) {
    return 1e4f*sqrtf(n);
}

static const float LARGEST_KEY = 65504.0f; // a model with larger ones does not run with the usual cache of f16

// Thrown as one sentence: what is wrong, and what to do.
static std::runtime_error refusal(const std::string & what) {
    return std::runtime_error("the calibration of the keys " + what + ": calibrate the model again");
}

// The array under a key; empty if there is none.
template<typename T>
static std::vector<T> array(const gguf_context * metadata, const std::string & key, gguf_type type) {
    const int64_t id = gguf_find_key(metadata, (KEY + key).c_str());
    if (id < 0) {
        return {};
    }
    if (gguf_get_kv_type(metadata, id) != GGUF_TYPE_ARRAY || gguf_get_arr_type(metadata, id) != type) {
        throw refusal("has a " + KEY + key + " of the wrong type");
    }
    const T * data = static_cast<const T *>(gguf_get_arr_data(metadata, id));
    return { data, data + gguf_get_arr_n(metadata, id) };
}

// FNV-1a, 64 bits.
template<typename T>
static void hash_into(uint64_t & hash, const std::vector<T> & values) {
    const uint8_t * bytes = reinterpret_cast<const uint8_t *>(values.data());
    for (size_t i = 0; i < values.size()*sizeof(T); ++i) {
        hash = (hash ^ bytes[i])*0x100000001b3;
    }
}

static bool has_sinks(const gguf_context * metadata, uint32_t n_layer) {
    for (uint32_t il = 0; il < n_layer; ++il) {
        if (gguf_find_tensor(metadata, format("blk.%u.attn_sinks.weight", il).c_str()) >= 0) {
            return true;
        }
    }
    return false;
}

// Throws if the vectors of a layer cannot come from calibration.py.
static void check_values(const llama_turbo_calibration::layer & layer, size_t il, size_t n_embd_head) {
    const float largest = largest_scale(n_embd_head);
    double log_sum = 0.0;
    for (size_t i = 0; i < layer.scale.size(); ++i) {
        const float scale = layer.scale[i];
        if (!std::isfinite(scale) || (!layer.center.empty() && !std::isfinite(layer.center[i]))) {
            throw refusal(format("holds a number that is none in layer %zu", il));
        }
        if (scale < 1.0f/largest || scale > largest) {
            throw refusal(format("has a scale of %g in layer %zu, which is %s", scale, il, scale > 0.0f ? "far from 1" : "not positive"));
        }
        if (!layer.center.empty() && std::abs(layer.center[i]) > LARGEST_KEY) {
            throw refusal(format("has a centre of %g in layer %zu, beyond all keys", layer.center[i], il));
        }
        log_sum += std::log(scale);
        if ((i + 1) % n_embd_head == 0) {
            if (std::abs(log_sum/n_embd_head) > 1e-3) { // float32 rounds to 1e-7
                throw refusal(format("has a head in layer %zu whose scales are %g in the geometric mean, not 1", il, std::exp(log_sum/n_embd_head)));
            }
            log_sum = 0.0;
        }
    }
}

std::shared_ptr<const llama_turbo_calibration> llama_turbo_calibration::load(const gguf_context * metadata, const llama_model & model) {
    const int64_t version = gguf_find_key(metadata, (KEY + "version").c_str());
    if (version < 0) {
        return nullptr;
    }
    const uint32_t known = gguf_get_kv_type(metadata, version) == GGUF_TYPE_UINT32 ? gguf_get_val_u32(metadata, version) : 0;
    if (known != 1 && known != 2) {
        throw refusal("is of another version than 1 and 2, which this build knows");
    }
    const auto & hparams = model.hparams;
    const auto sizes   = array<int32_t>(metadata, "sizes",  GGUF_TYPE_INT32);
    const auto centers = array<float>  (metadata, "center", GGUF_TYPE_FLOAT32);
    const auto scales  = array<float>  (metadata, "scale",  GGUF_TYPE_FLOAT32);
    const auto turned  = array<int32_t>(metadata, "turned", GGUF_TYPE_INT32);
    if (hparams.is_mla()) {
        throw refusal("is of no use: models of this architecture cannot be calibrated");
    }
    if (sizes.size() != hparams.n_layer_all) {
        throw refusal(format("is of a model of %zu layers, and this one has %u", sizes.size(), hparams.n_layer_all));
    }
    if (turned.size() != (known == 1 ? 0 : sizes.size())) {
        throw refusal("does not say of each layer how its centre turns");
    }

    auto result = std::make_shared<llama_turbo_calibration>();
    const int64_t context = gguf_find_key(metadata, (KEY + "context").c_str());
    if (context >= 0 && gguf_get_kv_type(metadata, context) != GGUF_TYPE_UINT32) {
        throw refusal("has a " + KEY + "context of the wrong type");
    }
    result->context = context >= 0 ? gguf_get_val_u32(metadata, context) : known == 1 ? CONTEXT_UNSAID : UINT32_MAX;
    const bool scores_shift = hparams.attn_soft_cap || has_sinks(metadata, hparams.n_layer_all);
    size_t begin = 0;
    for (size_t il = 0; il < sizes.size(); ++il) {
        if (sizes[il] < 0 || (sizes[il] != 0 && (uint32_t) sizes[il] != hparams.n_embd_k_gqa(il))) {
            throw refusal(format("has %d channels in layer %zu, and the model %u", sizes[il], il, hparams.n_embd_k_gqa(il)));
        }
        const size_t size = sizes[il];
        if (begin + size > scales.size() || (!centers.empty() && centers.size() != scales.size())) {
            throw refusal("is too short");
        }
        layer made;
        made.scale.assign(scales.begin() + begin, scales.begin() + begin + size);
        if (!centers.empty()) {
            made.center.assign(centers.begin() + begin, centers.begin() + begin + size);
        }
        check_values(made, il, hparams.n_embd_head_k(il));
        made.n_turned = turned.empty() ? 0 : turned[il];
        if (made.n_turned != 0 && (made.n_turned != hparams.n_rot(il) || made.center.empty() || !hparams.has_rope(il))) {
            throw refusal(format("has a centre that turns in %u channels in layer %zu, in which the model's keys do not", made.n_turned, il));
        }
        if (scores_shift && made.n_turned == 0 &&
                std::any_of(made.center.begin(), made.center.end(), [](float value) { return value != 0.0f; })) {
            throw refusal("centres keys, which changes a model with attention sinks or a cap on its scores");
        }
        result->layers.push_back(std::move(made));
        begin += size;
    }
    if (begin != scales.size()) {
        throw refusal("is too long");
    }
    result->hash = 0xcbf29ce484222325;
    hash_into(result->hash, sizes);
    hash_into(result->hash, centers);
    hash_into(result->hash, scales);
    hash_into(result->hash, turned);
    result->hash |= 1;
    return result;
}

static thread_local struct {
    const llama_cparams * cparams = nullptr; // of the context; null: not known
    bool                  warned;            // a model with sliding windows has two caches
} making;

llama_turbo_context::llama_turbo_context(const llama_cparams & cparams) {
    making = { &cparams, false };
}

llama_turbo_context::~llama_turbo_context() {
    making.cparams = nullptr;
}

// Whether the context that is being made is longer than the calibration is good for.
static bool is_too_long(const llama_turbo_calibration & calibration) {
    const uint32_t n_ctx = making.cparams ? making.cparams->n_ctx_seq : 0;
    if (n_ctx <= GGML_PAD((uint64_t) calibration.context, 256)) { // as contexts are
        return false;
    }
    if (!making.warned) {
        LLAMA_LOG_WARN("llama_kv_cache: keys are not calibrated: the calibration in the file is for contexts of up to %u tokens, and this one "
            "has %u; turboquant-gguf calibrate makes one for all contexts\n", calibration.context, n_ctx);
        making.warned = true;
    }
    return true;
}

llama_turbo_keys::llama_turbo_keys()  = default;
llama_turbo_keys::~llama_turbo_keys() = default;

// What the centres of a layer's tiles are made of: of_cosines and of_sines of llama_turbo_keys::layer.
static std::pair<std::vector<float>, std::vector<float>> turned(const llama_turbo_calibration::layer & from, const llama_turbo_rope & rope) {
    std::vector<float> of_cosines = from.center, of_sines(from.center.size(), 0.0f);
    for (size_t head = 0; head < from.center.size(); head += rope.n_embd) {
        for (size_t pair = 0; pair < rope.angles.size(); ++pair) {
            const llama_turbo_mean_turn mean(rope.angles[pair]);
            const auto [x, y] = rope.channels(pair);
            const double mx = from.center[head + x], my = from.center[head + y];
            of_cosines[head + x] = mean.real*mx - mean.imaginary*my; // at the tile's first position
            of_cosines[head + y] = mean.real*my + mean.imaginary*mx;
            of_sines[head + x]   = -of_cosines[head + y];
            of_sines[head + y]   =  of_cosines[head + x];
        }
    }
    return { of_cosines, of_sines };
}

// Rows of `size` values, one for each KV head, repeated for the query heads of its group; of several, they take turns.
static std::vector<float> by_query_head(const std::vector<const std::vector<float> *> & parts, size_t size, size_t n_group) {
    std::vector<float> result;
    for (size_t row = 0; row < parts[0]->size(); row += size) {
        for (size_t i = 0; i < n_group; ++i) {
            for (const std::vector<float> * part : parts) {
                result.insert(result.end(), part->begin() + row, part->begin() + row + size);
            }
        }
    }
    return result;
}

static void set(ggml_tensor * tensor, const std::vector<float> & values) {
    GGML_ASSERT(ggml_nbytes(tensor) == values.size()*sizeof(float));
    ggml_backend_tensor_set(tensor, values.data(), 0, ggml_nbytes(tensor));
}

std::shared_ptr<llama_turbo_keys> llama_turbo_keys::make(
        const llama_model & model, ggml_type type_k, const std::map<uint32_t, place> & places, std::string no_turning) {
    const auto & calibration = model.turbo_calibration;
    const int32_t use = llama_turbo_taken_params().calibration;
    if (!calibration || use == LLAMA_TURBO_USE_NONE ||
            (use != LLAMA_TURBO_USE_FORCE && (!ggml_is_quantized(type_k) || is_too_long(*calibration)))) {
        return nullptr;
    }

    if (!making.cparams) {
        no_turning = "the cache was made outside of a context, and its RoPE is not known";
    }
    auto result = std::make_shared<llama_turbo_keys>();
    result->calibration = calibration;
    size_t n_centered = 0, n_kept_back = 0;
    for (const auto & [il, place] : places) {
        const auto & from = calibration->layers[place.owner];
        if (from.scale.empty()) {
            continue;
        }
        auto & ctx = result->bufs[place.buft].first;
        if (!ctx) {
            ctx.reset(ggml_init({ /*.mem_size =*/ 6*places.size()*ggml_tensor_overhead(), /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ true }));
        }
        const auto matrix = [&ctx](int64_t n0, int64_t n1, int64_t n2 = 1) {
            return ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, n0, n1, n2);
        };
        const int64_t n_embd = model.hparams.n_embd_head_k(place.owner);
        const int64_t n_kv   = model.hparams.n_head_kv(place.owner);
        layer made = { nullptr, matrix(n_embd, n_kv), matrix(n_embd, model.hparams.n_head(il)), nullptr, nullptr, nullptr, 0 };
        if (from.n_turned == 0 && !from.center.empty()) {
            made.center = matrix(n_embd, n_kv);
        } else if (from.n_turned != 0 && !no_turning.empty()) {
            ++n_kept_back;
        } else if (from.n_turned != 0) {
            const llama_turbo_rope rope = llama_turbo_rope::of(model, *making.cparams, place.owner);
            if (rope.n_rot() != from.n_turned) {
                throw refusal(format("has a centre that turns in layer %u, where the keys of this context do not", place.owner));
            }
            auto & ropes = result->ropes;
            made.rope = std::find(ropes.begin(), ropes.end(), rope) - ropes.begin();
            if (made.rope == ropes.size()) {
                ropes.push_back(rope);
            }
            made.of_cosines = matrix(n_embd, n_kv);
            made.of_sines   = matrix(n_embd, n_kv);
            made.q_turned   = matrix(n_embd, 2, model.hparams.n_head(il));
        }
        n_centered += made.center || made.of_cosines;
        result->layers[il] = made;
    }
    for (auto & [buft, buf] : result->bufs) {
        buf.second.reset(ggml_backend_alloc_ctx_tensors_from_buft(buf.first.get(), buft));
        if (!buf.second) {
            throw std::runtime_error("failed to allocate the calibration of the keys");
        }
    }
    for (const auto & [il, to] : result->layers) {
        const auto & from = calibration->layers[places.at(il).owner];
        const size_t n_embd  = to.scale->ne[0];
        const size_t n_group = to.q_scale->ne[1]/to.scale->ne[1];
        if (to.center) {
            set(to.center, from.center);
        }
        if (to.of_cosines) {
            const auto [of_cosines, of_sines] = turned(from, result->ropes[to.rope]);
            set(to.of_cosines, of_cosines);
            set(to.of_sines,   of_sines);
            set(to.q_turned, by_query_head({ &of_cosines, &of_sines }, n_embd, n_group));
        }
        std::vector<float> inverse;
        for (float scale : from.scale) {
            inverse.push_back(1.0f/scale);
        }
        set(to.scale,   from.scale);
        set(to.q_scale, by_query_head({ &inverse }, n_embd, n_group));
    }
    LLAMA_LOG_INFO("llama_kv_cache: keys are scaled by channel in %zu layers and centred in %zu of them%s (calibration %016llx)\n",
        result->layers.size(), n_centered, result->turns() ? ", by position" : "", (unsigned long long) calibration->hash);
    if (n_kept_back > 0) {
        LLAMA_LOG_WARN("llama_kv_cache: keys are not centred by position in %zu layers: %s\n", n_kept_back, no_turning.c_str());
    }
    return result;
}

const ggml_tensor * llama_turbo_keys::scale(int32_t il) const {
    const auto it = layers.find(il);
    return it == layers.end() ? nullptr : it->second.scale;
}

const ggml_tensor * llama_turbo_keys::q_scale(int32_t il) const {
    const auto it = layers.find(il);
    return it == layers.end() ? nullptr : it->second.q_scale;
}

bool llama_turbo_keys::turns(int32_t il) const {
    const auto it = layers.find(il);
    return it != layers.end() && it->second.of_cosines;
}

template <typename F>
ggml_tensor * llama_turbo_keys::move(
        ggml_context * ctx, const layer & l, ggml_tensor * k, llm_graph_input_turbo_centers * centers, ggml_tensor * tiles, F && add) const {
    if (l.center) {
        return add(ctx, k, l.center);
    }
    if (!l.of_cosines) {
        return k;
    }
    const auto & basis = centers->of(ctx, l.rope, tiles, k->ne[1]);
    k = add(ctx, k, ggml_mul(ctx, basis.cosines, l.of_cosines));
    return add(ctx, k, ggml_mul(ctx, basis.sines, l.of_sines));
}

ggml_tensor * llama_turbo_keys::apply_k(
        ggml_context * ctx, ggml_tensor * k, int32_t il, llm_graph_input_turbo_centers * centers, ggml_tensor * tiles) const {
    const auto it = layers.find(il);
    if (it == layers.end()) {
        return k;
    }
    return ggml_mul(ctx, move(ctx, it->second, k, centers, tiles, ggml_sub), it->second.scale);
}

ggml_tensor * llama_turbo_keys::undo_k(
        ggml_context * ctx, ggml_tensor * k, int32_t il, llm_graph_input_turbo_centers * centers, ggml_tensor * tiles) const {
    const auto it = layers.find(il);
    if (it == layers.end()) {
        return k;
    }
    return move(ctx, it->second, ggml_div(ctx, k, it->second.scale), centers, tiles, ggml_add);
}

ggml_tensor * llama_turbo_keys::apply_q(ggml_context * ctx, ggml_tensor * q, int32_t il) const {
    const auto it = layers.find(il);
    return it == layers.end() ? q : ggml_mul(ctx, q, it->second.q_scale);
}

ggml_tensor * llama_turbo_keys::q_centers(
        ggml_context * ctx, ggml_tensor * q, int32_t il, const llm_graph_input_turbo_centers & centers) const {
    const layer & l = layers.at(il);
    const int64_t n_embd = q->ne[0], n_head = q->ne[1], n_tokens = q->ne[2];
    ggml_tensor * by_head = ggml_view_4d(ctx, q, n_embd, 1, n_head, n_tokens, q->nb[1], q->nb[1], q->nb[2], 0);
    // ggml repeats the second factor of a product, not the first
    ggml_tensor * turned = n_tokens == 1 ? l.q_turned : ggml_repeat_4d(ctx, l.q_turned, n_embd, 2, n_head, n_tokens);
    ggml_tensor * by_basis = ggml_reshape_3d(ctx, ggml_mul(ctx, turned, by_head), 2*n_embd, n_head, n_tokens);
    return ggml_mul_mat(ctx, centers.all(l.rope), by_basis);
}
