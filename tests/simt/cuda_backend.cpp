// llama.cpp's CUDA back end, as a library that is loaded at run time, with a device that takes only what is ours: the
// scheduler gives everything else to the CPU.

#include "ggml-backend-impl.h"
#include "ggml-cuda.h"

#include "cuda/turbo-cuda.h"

#include <cstdlib>

static bool (*supports)(ggml_backend_dev_t device, const ggml_tensor * op);
static bool takes_attention = true;

// Whether the device attends, too, from now on; else the CPU does, to what the device has stored. For programs, the
// variable SIMT_CPU_ATTENDS says so.
extern "C" void simt_take_attention(bool take) {
    takes_attention = take;
}

static bool supports_only_ours(ggml_backend_dev_t device, const ggml_tensor * op) {
    switch (op->op) {
        case GGML_OP_NONE:
        case GGML_OP_VIEW:
        case GGML_OP_RESHAPE:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
            return supports(device, op);
        case GGML_OP_FLASH_ATTN_EXT:
        case GGML_OP_CUSTOM:
            return takes_attention && ggml_cuda_turbo_supports(0, op) == 1 && supports(device, op);
        default:
            return ggml_cuda_turbo_supports(0, op) == 1 && supports(device, op);
    }
}

// In place of fattn.cu, which is not compiled here. It is not asked how much scratch attention of ours needs: there is
// none.
size_t ggml_cuda_flash_attn_ext_get_alloc_size(int, const ggml_tensor * result) {
    GGML_ASSERT(ggml_cuda_turbo_supports(0, result) < 0);
    return ggml_nbytes(result);
}

extern "C" ggml_backend_reg_t ggml_backend_init() {
    takes_attention = !getenv("SIMT_CPU_ATTENDS");
    ggml_backend_reg_t reg = ggml_backend_cuda_reg();
    for (size_t i = 0; i < ggml_backend_reg_dev_count(reg); ++i) {
        ggml_backend_dev_t device = ggml_backend_reg_dev_get(reg, i);
        supports = device->iface.supports_op;
        device->iface.supports_op = supports_only_ours;
    }
    return reg;
}
