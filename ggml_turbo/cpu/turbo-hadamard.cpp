// Walsh-Hadamard transform of rows: the rotation that llama.cpp applies to queries, keys and values of a quantized
// cache, a MUL_MAT whose first operand is hinted to be the orthonormal Hadamard matrix. The same additions in the same
// order as the stock operator, whose passes within a vector are scalar.

#include "turbo-ops.h"

#include "turbo-simd.h"

#ifdef TURBO_LANES

#include <cmath>

namespace {

// x of n values, a power of two and at least a vector.
void transform(const float * x, float * y, int64_t n) {
    const turbo_f32 scale = turbo_f32_set1(1.0f/sqrtf((float) n));
    for (int64_t i = 0; i < n; i += TURBO_F32_LANES) {
        turbo_f32 v = turbo_f32_mul(turbo_f32_load(x + i), scale);
        v = turbo_f32_butterfly(v, 1);
        v = turbo_f32_butterfly(v, 2);
        if (TURBO_F32_LANES > 4) {
            v = turbo_f32_butterfly(v, 4);
        }
        if (TURBO_F32_LANES > 8) {
            v = turbo_f32_butterfly(v, 8);
        }
        turbo_f32_store(y + i, v);
    }
    for (int64_t length = TURBO_F32_LANES; length < n; length *= 2) {
        for (int64_t i = 0; i < n; i += 2*length) {
            for (int64_t j = i; j < i + length; j += TURBO_F32_LANES) {
                const turbo_f32 u = turbo_f32_load(y + j), v = turbo_f32_load(y + j + length);
                turbo_f32_store(y + j,          turbo_f32_add(u, v));
                turbo_f32_store(y + j + length, turbo_f32_sub(u, v));
            }
        }
    }
}

struct hadamard_traits : ggml::cpu::tensor_traits {
    bool work_size(int, const ggml_tensor *, size_t &) override {
        return false; // the stock operator's: it does the work where the reference is asked for
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        if (params->use_ref) {
            return false;
        }
        const ggml_tensor * x = op->src[1];
        const int64_t rows = ggml_nrows(x), each = (rows + params->nth - 1)/params->nth;
        for (int64_t r = params->ith*each; r < rows && r < (params->ith + 1)*each; ++r) {
            const int64_t i1 = r % x->ne[1], i2 = r/x->ne[1] % x->ne[2], i3 = r/x->ne[1]/x->ne[2];
            transform((const float *) ((const char *) x->data + i1*x->nb[1] + i2*x->nb[2] + i3*x->nb[3]),
                      (float *) ((char *) op->data + i1*op->nb[1] + i2*op->nb[2] + i3*op->nb[3]), x->ne[0]);
        }
        return true;
    }
};

}  // namespace

ggml::cpu::tensor_traits * turbo_hadamard_claims(const ggml_tensor * op) {
    static hadamard_traits traits;
    const ggml_tensor * x = op->src[1];
    const bool ours = ggml_get_op_params_i32(op, 1) == GGML_HINT_SRC0_IS_HADAMARD && x->type == GGML_TYPE_F32 &&
                      x->nb[0] == sizeof(float) && x->ne[0] >= TURBO_F32_LANES;
    return ours ? &traits : nullptr;
}

#endif
