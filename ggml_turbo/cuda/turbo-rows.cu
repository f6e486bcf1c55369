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
    return turbo_can_decode(op->src[0], op) && turbo_can_copy(op->src[0], op);
}

bool turbo_takes_copy(int device, const ggml_tensor * op) {
    GGML_UNUSED(device);
    return op->type == op->src[0]->type && turbo_has_whole_blocks(op->src[0]) && turbo_has_whole_blocks(op) &&
        turbo_can_copy(op->src[0], op);
}

// Strides that llama.cpp can count in blocks.
static bool turbo_begins_with_blocks(const ggml_tensor * t) {
    const size_t bytes = ggml_type_size(t->type);
    return t->nb[1] % bytes == 0 && t->nb[2] % bytes == 0 && t->nb[3] % bytes == 0;
}

// llama.cpp decodes the weights to scratch and calls cuBLAS. It cannot take the precision of experts into account.
bool turbo_takes_mul_mat(int device, const ggml_tensor * op) {
    GGML_UNUSED(device);
    const ggml_tensor * weights = op->src[0];
    return turbo_is_type(weights->type) && turbo_has_whole_blocks(weights) && turbo_begins_with_blocks(weights) &&
        op->src[1]->type == GGML_TYPE_F32 && op->type == GGML_TYPE_F32 && op->src[1]->nb[0] == sizeof(float) &&
        !(op->op == GGML_OP_MUL_MAT_ID && op->op_params[3] == GGML_PREC_F32);
}

// ---- launches ----

// Blocks of threads for so many units of each row, of which each takes `each`: enough to fill any GPU, and no more,
// since each fills its table first.
static dim3 turbo_rows_grid(uint32_t units, uint32_t each, uint32_t rows) {
    const uint32_t x = std::min((units + each - 1)/each, 4096u);
    return dim3(x, std::min(rows, std::max(4096/x, 1u)));
}

template<typename T>
static void turbo_launch_decoder(ggml_type type, const turbo_tensor & blocks, const turbo_tensor & values,
                                 const turbo_rows & rows, cudaStream_t stream) {
    const uint32_t n_rows = values.ne[1]*values.ne[2]*values.ne[3];
    if (n_rows == 0 || values.ne[0] == 0) {
        return;
    }
    const dim3 grid   = turbo_rows_grid(values.ne[0], turbo_rows_threads/32, n_rows);
    const auto launch = [&](auto kernel) {
        turbo_launch(kernel, grid, dim3(turbo_rows_threads), 0, stream, blocks, values, rows, n_rows);
    };
#define TURBO_LAUNCH(K, ID) case GGML_TYPE_TURBO##K: launch(turbo_decode<K, T>); break;
    switch (type) {
        TURBO_TYPES(TURBO_LAUNCH)
        default: GGML_ABORT("%s is no turbo type", ggml_type_name(type));
    }
#undef TURBO_LAUNCH
}

static void turbo_launch_decoder(const ggml_tensor * blocks, const ggml_tensor * values, const turbo_rows & rows,
                                 cudaStream_t stream) {
    const turbo_tensor from = turbo_describe(blocks), to = turbo_describe(values);
    const auto launch = [&](auto type) { turbo_launch_decoder<decltype(type)>(blocks->type, from, to, rows, stream); };
    switch (values->type) {
        case GGML_TYPE_F16:  launch(half());        break;
        case GGML_TYPE_BF16: launch(nv_bfloat16()); break;
        default:             launch(float());       break;
    }
}

void turbo_get_rows(ggml_backend_cuda_context & context, ggml_tensor * op) {
    turbo_launch_decoder(op->src[0], op, turbo_describe_rows(op->src[1]), context.stream());
}

void turbo_copy_decoded(ggml_backend_cuda_context & context, ggml_tensor * op) {
    if (op->src[0]->ne[0] == op->ne[0]) {
        turbo_launch_decoder(op->src[0], op, {}, context.stream());
        return;
    }
    const ggml_tensor blocks = turbo_as_row(op->src[0]), values = turbo_as_row(op);
    turbo_launch_decoder(&blocks, &values, {}, context.stream());
}

void turbo_copy_blocks(ggml_backend_cuda_context & context, ggml_tensor * op) {
    const bool           one  = op->src[0]->ne[0] != op->ne[0];
    const ggml_tensor    from = one ? turbo_as_row(op->src[0]) : *op->src[0], to = one ? turbo_as_row(op) : *op;
    const uint32_t       rows = turbo_count_rows(&to), pairs = (uint32_t) (ggml_row_size(to.type, to.ne[0])/2);
    if (rows > 0 && pairs > 0) {
        turbo_launch(turbo_copy, turbo_rows_grid(pairs, turbo_rows_threads, rows), dim3(turbo_rows_threads), 0,
                     context.stream(), turbo_describe(&from), turbo_describe(&to), pairs, rows);
    }
}

// ---- functions for convert.cu ----

static char * turbo_blocks_at(const void * x) {
    return (char *) const_cast<void *>(x); // kernels that decode only read it
}

// Values side by side.
template<typename T> static turbo_tensor turbo_contiguous(T * y, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3) {
    const int64_t size = sizeof(T), row = ne0*size;
    return { (char *) y, { (uint32_t) (ne0/QK_TURBO), (uint32_t) ne1, (uint32_t) ne2, (uint32_t) ne3 },
             { QK_TURBO*size, row, row*ne1, row*ne1*ne2 } };
}

template<int K, ggml_type type, typename T>
static void turbo_convert(const void * x, T * y, int64_t n, cudaStream_t stream) {
    const turbo_tensor values = turbo_contiguous(y, n, 1, 1, 1);
    turbo_tensor       blocks = values;
    blocks.data  = turbo_blocks_at(x);
    blocks.nb[0] = TURBO_BLOCK_BYTES(K);
    turbo_launch_decoder<T>(type, blocks, values, {}, stream);
}

// Strides count blocks.
template<int K, ggml_type type, typename T>
static void turbo_convert(const void * x, T * y, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3,
                          int64_t s1, int64_t s2, int64_t s3, cudaStream_t stream) {
    constexpr int64_t  bytes  = TURBO_BLOCK_BYTES(K);
    const turbo_tensor values = turbo_contiguous(y, ne0, ne1, ne2, ne3);
    const turbo_tensor blocks = { turbo_blocks_at(x), { values.ne[0], values.ne[1], values.ne[2], values.ne[3] },
                                  { bytes, bytes*s1, bytes*s2, bytes*s3 } };
    turbo_launch_decoder<T>(type, blocks, values, {}, stream);
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
