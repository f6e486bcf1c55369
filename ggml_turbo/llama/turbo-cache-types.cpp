#include "turbo-cache-types.h"

#include "ggml-turbo.h"
#include "llama-arch.h"
#include "llama-cparams.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-memory-recurrent.h"
#include "llama-model.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <memory>
#include <stdexcept>
#include <string>

// The stock cache types whose block divides the head size, as --cache-type-k and -v name them.
static std::string types_for(uint32_t head_size) {
    std::string names;
    for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q5_1, GGML_TYPE_Q5_0,
                            GGML_TYPE_IQ4_NL, GGML_TYPE_Q4_1, GGML_TYPE_Q4_0, GGML_TYPE_F32 }) {
        if (head_size % ggml_blck_size(type) == 0) {
            names += std::string(names.empty() ? "" : ", ") + ggml_type_name(type);
        }
    }
    return names;
}

// Rows of the type can be written and read.
static bool can_be_cached(ggml_type type) {
    if (type < 0 || type >= GGML_TYPE_COUNT || ggml_blck_size(type) == 0) {
        return false;
    }
    const ggml_type_traits * traits = ggml_get_type_traits(type);
    return type == GGML_TYPE_F32 || (traits->to_float && traits->from_float_ref);
}

static bool check_number(const char * what, ggml_type type) {
    if (can_be_cached(type)) {
        return true;
    }
    const bool has_name = type >= 0 && type < GGML_TYPE_COUNT && ggml_blck_size(type) != 0;
    std::string numbers;
#define TURBO_NUMBER(K, ID) numbers += "turbo" #K " is " + std::to_string(GGML_TYPE_TURBO##K) + ", ";
    TURBO_TYPES(TURBO_NUMBER)
#undef TURBO_NUMBER
    LLAMA_LOG_ERROR("%s: the %s cache cannot be of type %d%s%s%s. Here %sf16 is %d and q8_0 %d; other builds of llama.cpp may "
        "number types otherwise\n", __func__, what, (int) type, has_name ? " (" : "",
        has_name ? ggml_type_name(type) : "", has_name ? "), which no cache can have" : ", which is none",
        numbers.c_str(), GGML_TYPE_F16, GGML_TYPE_Q8_0);
    return false;
}

static bool divides(ggml_type type, uint32_t head_size) {
    return !turbo_is_type(type) || head_size % QK_TURBO == 0;
}

static bool check_head(const char * what, ggml_type type, uint32_t head_size, uint32_t il) {
    if (divides(type, head_size)) {
        return true;
    }
    LLAMA_LOG_ERROR("%s: the %s cache cannot be %s: its blocks hold %d values of one head, and layer %u of this model has a %s head size of %u. "
        "Cache types that work for it: %s\n",
        __func__, what, ggml_type_name(type), QK_TURBO, il, what, head_size, types_for(head_size).c_str());
    return false;
}

// Whether a device writes rows of the type into a cache. What a device that says no has in its memory, no other can write:
// llama.cpp would abort in the first batch. Devices that split a cache between them say yes for it each.
static bool writes(ggml_backend_dev_t device, ggml_type type, int64_t n_embd) {
    if (!turbo_is_type(type) || n_embd == 0 || ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_META) {
        return true;
    }
    ggml_context_ptr ctx(ggml_init({ 4*ggml_tensor_overhead(), nullptr, true }));
    ggml_tensor * cache = ggml_new_tensor_2d(ctx.get(), type, n_embd, 256);
    ggml_tensor * rows  = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_embd, 1);
    ggml_tensor * cells = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I64, 1);
    return ggml_backend_dev_supports_op(device, ggml_set_rows(ctx.get(), cache, rows, cells));
}

static bool check_device(const char * what, ggml_type type, ggml_backend_dev_t device, int64_t n_embd) {
    if (writes(device, type, n_embd)) {
        return true;
    }
    LLAMA_LOG_ERROR("%s: the %s cache cannot be %s on %s, %s, which has no kernels for it. Keep the cache on the CPU "
        "(--no-kv-offload), or take a stock type\n", __func__, what, ggml_type_name(type), ggml_backend_dev_name(device),
        ggml_backend_dev_description(device));
    return false;
}

// Whether the model keeps keys and values. Embedding models, which read a text at once, do not, nor do recurrent ones.
static bool keeps_keys(const llama_model & model) {
    llama_memory_params params = {};
    params.type_k = params.type_v = GGML_TYPE_F16;
    llama_cparams cparams = {};
    cparams.n_ctx = cparams.n_ctx_seq = 256;
    cparams.n_batch = cparams.n_ubatch = 1;
    cparams.n_seq_max  = 1;
    cparams.flash_attn = true;
    cparams.kv_unified = true;
    try {
        const std::unique_ptr<llama_memory_i> memory(model.create_memory(params, cparams));
        return memory && !dynamic_cast<llama_memory_recurrent *>(memory.get());
    } catch (const std::exception &) {
        return true;
    }
}

bool llama_turbo_check_types(const llama_model & model, llama_context_params & params) {
    if (!check_number("K", params.type_k) || !check_number("V", params.type_v)) {
        return false;
    }
    const llama_hparams & hparams = model.hparams;
    int32_t wrong = -1; // the first layer that the types do not fit
    for (uint32_t il = 0; il < hparams.n_layer() && wrong < 0; ++il) {
        if (!divides(params.type_k, hparams.n_embd_head_k(il)) || !divides(params.type_v, hparams.n_embd_head_v(il))) {
            wrong = il;
        }
    }
    const auto n_embd_v = [&hparams](uint32_t il) { return hparams.is_mla() ? 0 : hparams.n_embd_v_gqa(il); };
    int32_t unwritten = -1; // the first layer on a device that does not write them; rows must be whole blocks to ask
    for (uint32_t il = 0; il < hparams.n_layer() && params.offload_kqv && wrong < 0 && unwritten < 0; ++il) {
        ggml_backend_dev_t device = model.dev_layer(il);
        if (!writes(device, params.type_k, hparams.n_embd_k_gqa(il)) || !writes(device, params.type_v, n_embd_v(il))) {
            unwritten = il;
        }
    }
    if (!divides(params.type_k, hparams.indexer_head_size)) { // a second cache of keys, by which some models choose what to attend to
        LLAMA_LOG_ERROR("%s: the K cache cannot be %s: its blocks hold %d values of one head, and the indexer of this model has a head size of %u. "
            "Cache types that work for it: %s\n", __func__, ggml_type_name(params.type_k), QK_TURBO, hparams.indexer_head_size,
            types_for(hparams.indexer_head_size).c_str());
        return false;
    }
    const bool lacks_attention = ggml_is_quantized(params.type_v) && params.flash_attn_type == LLAMA_FLASH_ATTN_TYPE_DISABLED;
    if ((wrong >= 0 || unwritten >= 0 || lacks_attention) && !keeps_keys(model)) {
        LLAMA_LOG_INFO("%s: this model keeps no keys and values: cache types %s and %s have nothing to do\n", __func__,
            ggml_type_name(params.type_k), ggml_type_name(params.type_v));
        params.type_k = params.type_v = GGML_TYPE_F16;
        return true;
    }
    if (model.arch == LLM_ARCH_DEEPSEEK4 && params.n_seq_max > 1 && (turbo_is_type(params.type_k) || turbo_is_type(params.type_v))) {
        LLAMA_LOG_ERROR("%s: the cache cannot be %s: %s models share a compressed cache between sequences in ways that no quantized type "
            "has. Use one sequence (--parallel 1), or f16\n", __func__,
            ggml_type_name(turbo_is_type(params.type_k) ? params.type_k : params.type_v), llm_arch_name(model.arch));
        return false;
    }
    if (wrong >= 0) {
        return check_head("K", params.type_k, hparams.n_embd_head_k(wrong), wrong) && check_head("V", params.type_v, hparams.n_embd_head_v(wrong), wrong);
    }
    return unwritten < 0 ||
        (check_device("K", params.type_k, model.dev_layer(unwritten), hparams.n_embd_k_gqa(unwritten)) &&
         check_device("V", params.type_v, model.dev_layer(unwritten), n_embd_v(unwritten)));
}
