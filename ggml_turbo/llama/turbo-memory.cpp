#include "llama/turbo-memory.h"

#include "llama-ext.h"
#include "llama-model.h"

#include <string>

struct turbo_memory {
    llama_model * model;
};

static thread_local std::string turbo_errors;

// While it lives, llama.cpp's errors go into turbo_errors and the rest of its log nowhere.
struct turbo_error_log {
    ggml_log_callback previous;
    void *            previous_data;
    bool              in_error = false; // of a message that comes in pieces

    turbo_error_log() {
        turbo_errors.clear();
        llama_log_get(&previous, &previous_data);
        llama_log_set(keep, this);
    }

    ~turbo_error_log() {
        llama_log_set(previous, previous_data);
    }

    static void keep(ggml_log_level level, const char * text, void * data) {
        bool & in_error = ((turbo_error_log *) data)->in_error;
        if (level != GGML_LOG_LEVEL_CONT) {
            in_error = level == GGML_LOG_LEVEL_ERROR;
        }
        if (in_error) {
            turbo_errors += text;
        }
    }
};

turbo_memory * turbo_memory_open(const char * path) {
    turbo_error_log log;

    // The CPU back end only, so that the answer is the same on every machine.
    ggml_backend_dev_t no_devices[] = { nullptr };

    llama_model_params params = llama_model_default_params();
    params.devices   = no_devices;
    params.no_alloc  = true;
    params.load_mode = LLAMA_LOAD_MODE_NONE; // what no_alloc goes with: no file is mapped

    llama_model * model = llama_model_load_from_file(path, params);
    return model ? new turbo_memory { model } : nullptr;
}

void turbo_memory_close(turbo_memory * memory) {
    llama_model_free(memory->model);
    delete memory;
}

uint32_t turbo_memory_n_layer(const turbo_memory * memory) {
    return memory->model->hparams.n_layer();
}

turbo_memory_layer turbo_memory_get_layer(const turbo_memory * memory, uint32_t il) {
    const llama_hparams & hparams = memory->model->hparams;

    // Where all layers are recurrent, each has attention beside it; where some are, those have none.
    bool all_recurrent = true;
    for (uint32_t i = 0; i < hparams.n_layer(); ++i) {
        all_recurrent = all_recurrent && hparams.is_recr(i);
    }
    if (hparams.n_head_kv(il) == 0 || (hparams.is_recr(il) && !all_recurrent)) {
        return {};
    }
    return {
        /*.n_head      =*/ hparams.n_head(il),
        /*.n_head_kv   =*/ hparams.n_head_kv(il),
        /*.head_size_k =*/ hparams.n_embd_head_k(il),
        /*.head_size_v =*/ hparams.n_embd_head_v(il),
        /*.n_window    =*/ hparams.is_swa(il) ? hparams.n_swa : 0,
        /*.shares      =*/ !hparams.has_kv(il),
    };
}

bool turbo_memory_measure(turbo_memory * memory, int type_k, int type_v, uint32_t n_ctx, uint32_t n_ubatch, turbo_memory_size * size) {
    turbo_error_log log;

    llama_context_params params = llama_context_default_params();
    params.type_k          = (ggml_type) type_k;
    params.type_v          = (ggml_type) type_v;
    params.n_ctx           = n_ctx;
    params.n_ubatch        = n_ubatch;
    params.n_outputs_max   = 1;     // llama-server wants logits of one token a sequence,
    params.swa_full        = false; // and a sliding window's cache no longer than the window
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;

    llama_context * context = llama_init_from_model(memory->model, params);
    if (!context) {
        return false;
    }
    *size = {};
    for (const auto & [buffer_type, bytes] : llama_get_memory_breakdown(context)) {
        size->weights += bytes.model;
        size->cache   += bytes.context;
        size->compute += bytes.compute;
    }
    llama_free(context);
    return true;
}

const char * turbo_memory_errors(void) {
    return turbo_errors.c_str();
}
