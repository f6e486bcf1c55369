// Rows into a turbo cache (SET_ROWS): the blocks of all rows are shared out among the threads, so that a single token's
// key is encoded by several.

#include "turbo-ops.h"

#include "turbo-cpu.h"

namespace {

constexpr int64_t SHARE = 2; // blocks that the encoder searches side by side

struct set_rows_traits : ggml::cpu::tensor_traits {
    bool work_size(int, const ggml_tensor *, size_t &) override {
        return false; // the stock operator's, which is none for float32
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * dst) override {
        if (params->use_ref) {
            return false;
        }
        const ggml_tensor * x = dst->src[0], * indices = dst->src[1];
        const turbo_codec * codec = turbo_get_codec(turbo_bits(dst->type));
        const int64_t blocks_of_row = x->ne[0]/QK_TURBO, shares_of_row = (blocks_of_row + SHARE - 1)/SHARE;
        const int64_t n_shares = ggml_nrows(x)*shares_of_row;
        const int64_t first = n_shares*params->ith/params->nth, end = n_shares*(params->ith + 1)/params->nth;
        for (int64_t i = first; i < end; ++i) {
            const int64_t block = i % shares_of_row*SHARE, row = i/shares_of_row;
            const int64_t i1 = row % x->ne[1], i2 = row/x->ne[1] % x->ne[2], i3 = row/x->ne[1]/x->ne[2];
            const char * index = (const char *) indices->data + i1*indices->nb[0] + i2 % indices->ne[1]*indices->nb[1]
                + i3 % indices->ne[2]*indices->nb[2];
            const int64_t to = indices->type == GGML_TYPE_I64 ? *(const int64_t *) index : *(const int32_t *) index;
            GGML_ASSERT(to >= 0 && to < dst->ne[1]);
            const int64_t n = blocks_of_row - block < SHARE ? blocks_of_row - block : SHARE;
            turbo_quantize_blocks_cpu(codec,
                (const float *) ((const char *) x->data + i1*x->nb[1] + i2*x->nb[2] + i3*x->nb[3]) + block*QK_TURBO,
                (uint8_t *) dst->data + to*dst->nb[1] + i2*dst->nb[2] + i3*dst->nb[3] + block*TURBO_BLOCK_BYTES(codec->bits), n);
        }
        return true;
    }
};

}  // namespace

ggml::cpu::tensor_traits * turbo_set_rows_claims(const ggml_tensor * op) {
    static set_rows_traits traits;
    return turbo_bits(op->type) && op->src[0]->type == GGML_TYPE_F32 ? &traits : nullptr;
}
