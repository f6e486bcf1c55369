#include "turbo-operators.h"

#include "turbo-describe.cuh"
#include "turbo-rows.cuh"

#include "ggml-cuda/convert.cuh"

#include <algorithm>

// ---- which nodes ----

static bool turbo_can_decode(const ggml_tensor * blocks, const ggml_tensor * values) {
    return turbo_is_type(blocks->type) && turbo_is_float(values->type) &&
        turbo_has_whole_blocks(blocks) && turbo_has_whole_blocks(values);
}

bool turbo_takes_get_rows(int device, const ggml_tensor * op) {
    GGML_UNUSED(device);
    return turbo_can_decode(op->src[0], op) && turbo_is_index(op->src[1]);
}

bool turbo_takes_decoding(int device, const ggml_tensor * op) {
    GGML_UNUSED(device);
    return turbo_can_decode(op->src[0], op);
}

bool turbo_takes_copy(int device, const ggml_tensor * op) {
    GGML_UNUSED(device);
    return op->type == op->src[0]->type && turbo_has_whole_blocks(op->src[0]) && turbo_has_whole_blocks(op);
}

// llama.cpp decodes the weights to scratch and calls cuBLAS. It cannot take their precision into account.
bool turbo_takes_mul_mat(int device, const ggml_tensor * op) {
    GGML_UNUSED(device);
    const ggml_tensor * weights = op->src[0];
    return turbo_is_type(weights->type) && turbo_has_whole_blocks(weights) && op->src[1]->type == GGML_TYPE_F32 &&
        op->type == GGML_TYPE_F32 && op->src[1]->nb[0] == sizeof(float) &&
        !(op->op == GGML_OP_MUL_MAT_ID && op->op_params[3] == GGML_PREC_F32);
}

// ---- launches ----

// Enough blocks of threads to fill any GPU; each fills its table once and goes on from there.
static unsigned turbo_rows_grid(int64_t n, int64_t each) {
    return (unsigned) std::min<int64_t>((n + each - 1)/each, 4096);
}

template<typename T>
static void turbo_decode_blocks(ggml_type type, const turbo_tensor & blocks, const turbo_tensor & values, const turbo_rows & rows,
                                int64_t n, cudaStream_t stream) {
    if (n == 0) {
        return;
    }
    const auto launch = [&](auto kernel) {
        turbo_launch(kernel, dim3(turbo_rows_grid(n, turbo_rows_threads/32)), dim3(turbo_rows_threads), 0, stream, blocks, values, rows, n);
    };
#define TURBO_LAUNCH(K, ID) case GGML_TYPE_TURBO##K: launch(turbo_decode<K, T>); break;
    switch (type) {
        TURBO_TYPES(TURBO_LAUNCH)
        default: GGML_ABORT("%s is no turbo type", ggml_type_name(type));
    }
#undef TURBO_LAUNCH
}

void turbo_decode_rows(ggml_backend_cuda_context & context, ggml_tensor * op) {
    const ggml_tensor * blocks = op->src[0];
    const auto decode = [&](auto type) {
        turbo_decode_blocks<decltype(type)>(blocks->type, turbo_describe(blocks), turbo_describe(op), turbo_describe_rows(op),
                                            ggml_nelements(op)/QK_TURBO, context.stream());
    };
    switch (op->type) {
        case GGML_TYPE_F16:  decode(half());        break;
        case GGML_TYPE_BF16: decode(nv_bfloat16()); break;
        default:             decode(float());       break;
    }
}

void turbo_copy_blocks(ggml_backend_cuda_context & context, ggml_tensor * op) {
    const int64_t n     = ggml_nelements(op)/QK_TURBO;
    const int     pairs = (int) ggml_type_size(op->type)/2;
    if (n > 0) {
        turbo_launch(turbo_copy, dim3(turbo_rows_grid(n*pairs, turbo_rows_threads)), dim3(turbo_rows_threads), 0, context.stream(),
                     turbo_describe(op->src[0]), turbo_describe(op), pairs, n);
    }
}

// ---- functions for convert.cu ----

// Values side by side.
template<typename T> static turbo_tensor turbo_contiguous(T * y, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3) {
    const int64_t row = ne0*(int64_t) sizeof(T);
    return { (char *) y, { ne0/QK_TURBO, ne1, ne2, ne3 }, { QK_TURBO*(int64_t) sizeof(T), row, row*ne1, row*ne1*ne2 } };
}

template<int K, ggml_type type, typename T> static void turbo_convert(const void * x, T * y, int64_t n, cudaStream_t stream) {
    const int64_t units = n/QK_TURBO;
    const turbo_tensor blocks = { (char *) x, { units, 1, 1, 1 }, { TURBO_BLOCK_BYTES(K), 0, 0, 0 } };
    turbo_decode_blocks<T>(type, blocks, turbo_contiguous(y, n, 1, 1, 1), {}, units, stream);
}

// Strides count blocks.
template<int K, ggml_type type, typename T>
static void turbo_convert(const void * x, T * y, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3, int64_t s1, int64_t s2, int64_t s3,
                          cudaStream_t stream) {
    constexpr int64_t bytes = TURBO_BLOCK_BYTES(K);
    const turbo_tensor blocks = { (char *) x, { ne0/QK_TURBO, ne1, ne2, ne3 }, { bytes, bytes*s1, bytes*s2, bytes*s3 } };
    turbo_decode_blocks<T>(type, blocks, turbo_contiguous(y, ne0, ne1, ne2, ne3), {}, ne0*ne1*ne2*ne3/QK_TURBO, stream);
}

template<typename Function> ggml_cuda_turbo_converter::operator Function() const {
#define TURBO_CONVERT(K, ID) case GGML_TYPE_TURBO##K: return turbo_convert<K, GGML_TYPE_TURBO##K>;
    switch (type) {
        TURBO_TYPES(TURBO_CONVERT)
        default: return nullptr;
    }
#undef TURBO_CONVERT
}
template ggml_cuda_turbo_converter::operator to_fp32_cuda_t() const;
template ggml_cuda_turbo_converter::operator to_fp16_cuda_t() const;
template ggml_cuda_turbo_converter::operator to_bf16_cuda_t() const;
template ggml_cuda_turbo_converter::operator to_fp32_nc_cuda_t() const;
template ggml_cuda_turbo_converter::operator to_fp16_nc_cuda_t() const;
template ggml_cuda_turbo_converter::operator to_bf16_nc_cuda_t() const;
