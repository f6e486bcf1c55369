// Stands in for what llama.cpp's CUDA back end multiplies matrices with, as far as weights of ours need it: cuBLAS with
// float sums; conversions of stock types, beside ours, which run in the emulator; rows of activations for experts.

#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/turbo-cuda.h"

#include <cstdlib>
#include <cstring>

#define CHECK(x) ((x) ? (void) 0 : abort())

// ---- cuBLAS: C = A' * B, in columns ----

static float load(const void * p, cudaDataType type, size_t i) {
    return type == CUDA_R_32F ? ((const float *) p)[i]
         : type == CUDA_R_16F ? __half2float(((const half *) p)[i]) : __bfloat162float(((const nv_bfloat16 *) p)[i]);
}

static void store(void * p, cudaDataType type, size_t i, float x) {
    switch (type) {
        case CUDA_R_32F: ((float *) p)[i] = x; break;
        case CUDA_R_16F: ((half *) p)[i] = __float2half(x); break;
        default:         ((nv_bfloat16 *) p)[i] = __float2bfloat16(x); break;
    }
}

extern "C" {

cublasStatus_t cublasCreate(cublasHandle_t * handle) {
    *handle = nullptr;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasDestroy(cublasHandle_t)                      { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t)    { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetStream(cublasHandle_t, cudaStream_t)      { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetWorkspace(cublasHandle_t, void *, size_t) { return CUBLAS_STATUS_SUCCESS; }

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t, cublasOperation_t of_a, cublasOperation_t of_b, int m, int n,
                                          int k, const void *, const void * a, cudaDataType type_a, int lda,
                                          long long stride_a, const void * b, cudaDataType type_b, int ldb,
                                          long long stride_b, const void *, void * c, cudaDataType type_c, int ldc,
                                          long long stride_c, int count, cublasComputeType_t, cublasGemmAlgo_t) {
    CHECK(of_a == CUBLAS_OP_T && of_b == CUBLAS_OP_N);
    for (int batch = 0; batch < count; ++batch) {
        for (int i = 0; i < m*n; ++i) {
            const int row = i % m, column = i/m;
            float sum = 0.0f;
            for (int j = 0; j < k; ++j) {
                sum += load(a, type_a, batch*stride_a + (size_t) row*lda + j)*
                       load(b, type_b, batch*stride_b + (size_t) column*ldb + j);
            }
            store(c, type_c, batch*stride_c + (size_t) column*ldc + row, sum);
        }
    }
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t of_a, cublasOperation_t of_b, int m, int n, int k,
                            const void * alpha, const void * a, cudaDataType type_a, int lda, const void * b,
                            cudaDataType type_b, int ldb, const void * beta, void * c, cudaDataType type_c, int ldc,
                            cublasComputeType_t compute, cublasGemmAlgo_t algorithm) {
    return cublasGemmStridedBatchedEx(handle, of_a, of_b, m, n, k, alpha, a, type_a, lda, 0, b, type_b, ldb, 0, beta, c,
                                      type_c, ldc, 0, 1, compute, algorithm);
}

cublasStatus_t cublasSgemm(cublasHandle_t handle, cublasOperation_t of_a, cublasOperation_t of_b, int m, int n, int k,
                           const float * alpha, const float * a, int lda, const float * b, int ldb, const float * beta,
                           float * c, int ldc) {
    return cublasGemmEx(handle, of_a, of_b, m, n, k, alpha, a, CUDA_R_32F, lda, b, CUDA_R_32F, ldb, beta, c, CUDA_R_32F,
                        ldc, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
}

} // extern "C"

// ---- convert.cu ----

template<typename From, typename To> static void convert(const void * x, To * y, int64_t n, cudaStream_t) {
    for (int64_t i = 0; i < n; ++i) {
        y[i] = To((float) ((const From *) x)[i]);
    }
}

template<typename To> static auto converter(ggml_type type) -> void (*)(const void *, To *, int64_t, cudaStream_t) {
    if (turbo_is_type(type)) {
        return ggml_cuda_turbo_converter{type};
    }
    CHECK(type == GGML_TYPE_F32 || type == GGML_TYPE_F16);
    return type == GGML_TYPE_F32 ? convert<float, To> : convert<half, To>;
}

auto ggml_get_to_fp32_cuda(ggml_type type) { return converter<float>(type); }
auto ggml_get_to_fp16_cuda(ggml_type type) { return converter<half>(type); }

// Of tensors with gaps: weights of ours only.
template<typename To> using with_gaps = void (*)(const void *, To *, int64_t, int64_t, int64_t, int64_t, int64_t,
                                                 int64_t, int64_t, cudaStream_t);

with_gaps<float> ggml_get_to_fp32_nc_cuda(ggml_type type) { return ggml_cuda_turbo_converter{type}; }
with_gaps<half>  ggml_get_to_fp16_nc_cuda(ggml_type type) { return ggml_cuda_turbo_converter{type}; }

// ---- getrows.cu, of one row after the other ----

void get_rows_cuda(const void * from, ggml_type type, const int32_t * index, void * to, ggml_type type_to, int64_t n,
                   size_t stride, size_t, size_t, int64_t rows, int64_t, int64_t, size_t, size_t, size_t,
                   size_t stride_to, size_t, size_t, cudaStream_t) {
    CHECK(type == GGML_TYPE_F32 && type_to == GGML_TYPE_F32);
    for (int64_t row = 0; row < rows; ++row) {
        memcpy((char *) to + row*stride_to, (const char *) from + index[row]*stride, n*sizeof(float));
    }
}

// ---- kernels of llama.cpp's that do not take our types: mmvf.cu, mmf.cu, mmvq.cu, mmq.cu, fwht.cu ----

bool ggml_cuda_should_use_mmvf(ggml_type, int, const int64_t *, const size_t *, int64_t)       { return false; }
bool ggml_cuda_should_use_mmf(ggml_type, int, int, const int64_t *, const size_t *, int, bool) { return false; }
bool ggml_cuda_should_use_mmvq(ggml_type, int, int64_t)                                        { return false; }
int  get_mmvq_mmid_max_batch(ggml_type, int)                                                   { return 0; }
bool ggml_cuda_should_use_mmq(ggml_type, int, int64_t, int64_t)                                { return false; }
bool ggml_cuda_op_mul_mat_use_fwht(const ggml_tensor *)                                        { return false; }
