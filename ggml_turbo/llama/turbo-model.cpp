// The members of llama_model that insertions declare: what a file's metadata say of keys and values, and what contexts
// the model allows.

#include "llama-model.h"
#include "turbo-cache-types.h"
#include "turbo-calibration.h"
#include "turbo-last-error.h"
#include "turbo-settings.h"
#include "turbo-value-rotation.h"

void llama_model::turbo_load(const gguf_context * metadata) {
    llama_turbo_check_values(gguf_kv);
    turbo_calibration = llama_turbo_calibration::load(metadata, *this);
}

void llama_model::turbo_check_lora(const std::string & tensor) const {
    llama_turbo_check_lora(gguf_kv, tensor);
}

bool llama_model::turbo_begin_context(llama_context_params & params) const {
    llama_turbo_forget_errors();
    try {
        llama_turbo_take_params(params.ctx_other != nullptr);
    } catch (const std::exception & error) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, error.what());
        return false;
    }
    return llama_turbo_check_types(*this, params);
}

void llama_model::turbo_end_context() const {
    llama_turbo_forget_errors();
}
