#include "llama/turbo-calibration.h"

#include "llama-impl.h"
#include "llama-model.h"
#include "turbo-settings.h"

#include "gguf.h"

#include <cmath>
#include <stdexcept>
#include <string>

static const std::string KEY = "turboquant.keys.";

// Files that do not say what they were measured for were measured at positions 0 to 1023. That far again the gain is
// smaller; at 8192 it has become a loss (docs/calibration.md).
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
    if (gguf_get_kv_type(metadata, version) != GGUF_TYPE_UINT32 || gguf_get_val_u32(metadata, version) != 1) {
        throw refusal("is not of version 1, the only one this build knows");
    }
    const auto & hparams = model.hparams;
    const auto sizes   = array<int32_t>(metadata, "sizes",  GGUF_TYPE_INT32);
    const auto centers = array<float>  (metadata, "center", GGUF_TYPE_FLOAT32);
    const auto scales  = array<float>  (metadata, "scale",  GGUF_TYPE_FLOAT32);
    if (hparams.is_mla()) {
        throw refusal("is of no use: models of this architecture cannot be calibrated");
    }
    if (!centers.empty() && (hparams.attn_soft_cap || has_sinks(metadata, hparams.n_layer_all))) {
        throw refusal("centres keys, which changes a model with attention sinks or a cap on its scores");
    }
    if (sizes.size() != hparams.n_layer_all) {
        throw refusal(format("is of a model of %zu layers, and this one has %u", sizes.size(), hparams.n_layer_all));
    }

    auto result = std::make_shared<llama_turbo_calibration>();
    const int64_t context = gguf_find_key(metadata, (KEY + "context").c_str());
    if (context >= 0 && gguf_get_kv_type(metadata, context) != GGUF_TYPE_UINT32) {
        throw refusal("has a " + KEY + "context of the wrong type");
    }
    result->context = context >= 0 ? gguf_get_val_u32(metadata, context) : CONTEXT_UNSAID;
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
    result->hash |= 1;
    return result;
}

static thread_local struct {
    uint32_t n_ctx = 0; // 0: not known
    bool     warned;    // a model with sliding windows has two caches
} making;

llama_turbo_context::llama_turbo_context(uint32_t n_ctx) {
    making = { n_ctx, false };
}

llama_turbo_context::~llama_turbo_context() {
    making.n_ctx = 0;
}

// Whether the context that is being made is longer than the calibration is good for.
static bool is_too_long(const llama_turbo_calibration & calibration) {
    if (making.n_ctx <= GGML_PAD((uint64_t) calibration.context, 256)) { // as contexts are
        return false;
    }
    if (!making.warned) {
        LLAMA_LOG_WARN("llama_kv_cache: keys are not calibrated: the calibration in the file is for contexts of up to %u tokens, and this one "
            "has %u; turboquant-gguf calibrate --context %u makes one for it\n", calibration.context, making.n_ctx, making.n_ctx);
        making.warned = true;
    }
    return true;
}

std::shared_ptr<llama_turbo_keys> llama_turbo_keys::make(const llama_model & model, ggml_type type_k, const std::map<uint32_t, place> & places) {
    const auto & calibration = model.turbo_calibration;
    const int32_t use = llama_turbo_taken_params().calibration;
    if (!calibration || use == LLAMA_TURBO_USE_NONE ||
            (use != LLAMA_TURBO_USE_FORCE && (!ggml_is_quantized(type_k) || is_too_long(*calibration)))) {
        return nullptr;
    }

    auto result = std::make_shared<llama_turbo_keys>();
    result->calibration = calibration;
    for (const auto & [il, place] : places) {
        const auto & from = calibration->layers[place.owner];
        if (from.scale.empty()) {
            continue;
        }
        auto & ctx = result->bufs[place.buft].first;
        if (!ctx) {
            ctx.reset(ggml_init({ /*.mem_size =*/ 3*places.size()*ggml_tensor_overhead(), /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ true }));
        }
        const int64_t n_embd = model.hparams.n_embd_head_k(place.owner);
        const int64_t n_kv   = model.hparams.n_head_kv(place.owner);
        result->layers[il] = {
            from.center.empty() ? nullptr : ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_embd, n_kv),
            ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_embd, n_kv),
            ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_embd, model.hparams.n_head(il)),
        };
    }
    for (auto & [buft, buf] : result->bufs) {
        buf.second.reset(ggml_backend_alloc_ctx_tensors_from_buft(buf.first.get(), buft));
        if (!buf.second) {
            throw std::runtime_error("failed to allocate the calibration of the keys");
        }
    }
    for (const auto & [il, to] : result->layers) {
        const auto & from = calibration->layers[places.at(il).owner];
        if (to.center) {
            ggml_backend_tensor_set(to.center, from.center.data(), 0, ggml_nbytes(to.center));
        }
        ggml_backend_tensor_set(to.scale, from.scale.data(), 0, ggml_nbytes(to.scale));
        const size_t n_embd  = to.scale->ne[0];
        const size_t n_group = to.q_scale->ne[1]/to.scale->ne[1];
        std::vector<float> q_scale(ggml_nelements(to.q_scale));
        for (size_t i = 0; i < q_scale.size(); ++i) {
            q_scale[i] = 1.0f/from.scale[i/(n_embd*n_group)*n_embd + i%n_embd];
        }
        ggml_backend_tensor_set(to.q_scale, q_scale.data(), 0, ggml_nbytes(to.q_scale));
    }
    LLAMA_LOG_INFO("%s: keys are stored %sscaled by channel in %zu layers (calibration %016llx)\n", __func__,
        !result->layers.empty() && result->layers.begin()->second.center ? "centred and " : "", result->layers.size(),
        (unsigned long long) calibration->hash);
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

ggml_tensor * llama_turbo_keys::apply_k(ggml_context * ctx, ggml_tensor * k, int32_t il) const {
    const auto it = layers.find(il);
    if (it == layers.end()) {
        return k;
    }
    if (it->second.center) {
        k = ggml_sub(ctx, k, it->second.center);
    }
    return ggml_mul(ctx, k, it->second.scale);
}

ggml_tensor * llama_turbo_keys::apply_q(ggml_context * ctx, ggml_tensor * q, int32_t il) const {
    const auto it = layers.find(il);
    return it == layers.end() ? q : ggml_mul(ctx, q, it->second.q_scale);
}

ggml_tensor * llama_turbo_keys::undo_k(ggml_context * ctx, ggml_tensor * k, int32_t il) const {
    const auto it = layers.find(il);
    if (it == layers.end()) {
        return k;
    }
    k = ggml_div(ctx, k, it->second.scale);
    return it->second.center ? ggml_add(ctx, k, it->second.center) : k;
}
