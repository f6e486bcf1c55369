#include "turbo-ops.h"

#include "ggml-cpu.h"
#include "turbo-simd.h"
#include "ops/turbo-window.h"

#ifdef TURBO_LANES

namespace {

struct turbo_buffer_type : ggml::cpu::extra_buffer_type {
    bool supports_op(ggml_backend_dev_t, const ggml_tensor *) override {
        return false; // asked for tensors in this buffer type, of which there are none
    }

    ggml::cpu::tensor_traits * get_tensor_traits(const ggml_tensor * op) override {
        switch (op->op) {
            case GGML_OP_CUSTOM:         return turbo_is_window_attention(op) ? turbo_attention_claims(op) : nullptr;
            case GGML_OP_FLASH_ATTN_EXT: return turbo_attention_claims(op);
            case GGML_OP_MUL_MAT:        return turbo_hadamard_claims(op);
            case GGML_OP_SET_ROWS:       return turbo_set_rows_claims(op);
            default:                     return nullptr;
        }
    }
};

}  // namespace

ggml_backend_buffer_type_t ggml_backend_cpu_turbo_buffer_type(void) {
    static turbo_buffer_type claims;
    static ggml_backend_buffer_type type = {
        /* .iface = */ {
            /* .get_name       = */ [](ggml_backend_buffer_type_t) { return "CPU_TURBO"; },
            /* .alloc_buffer   = */ [](ggml_backend_buffer_type_t, size_t) -> ggml_backend_buffer_t { return nullptr; },
            /* .get_alignment  = */ [](ggml_backend_buffer_type_t) -> size_t { return 64; },
            /* .get_max_size   = */ nullptr,
            /* .get_alloc_size = */ nullptr,
            /* .is_host        = */ nullptr,
        },
        /* .device  = */ ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0),
        /* .context = */ &claims,
    };
    return &type;
}

#else

ggml_backend_buffer_type_t ggml_backend_cpu_turbo_buffer_type(void) {
    return nullptr;
}

#endif
