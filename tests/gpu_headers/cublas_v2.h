#pragma once

// What llama.cpp's sources name of cuBLAS, to compile them where the CUDA toolkit has none. simt/cuda_products.cpp has
// some of it.

#include <cuda_runtime.h>
#include <library_types.h>

typedef struct cublasContext * cublasHandle_t;
typedef enum { CUBLAS_STATUS_SUCCESS } cublasStatus_t;
typedef enum { CUBLAS_OP_N, CUBLAS_OP_T } cublasOperation_t;
typedef enum { CUBLAS_TF32_TENSOR_OP_MATH } cublasMath_t;
typedef enum { CUBLAS_GEMM_DEFAULT, CUBLAS_GEMM_DEFAULT_TENSOR_OP } cublasGemmAlgo_t;
typedef enum { CUBLAS_COMPUTE_16F, CUBLAS_COMPUTE_32F } cublasComputeType_t;

extern "C" {
cublasStatus_t cublasCreate(cublasHandle_t *);
cublasStatus_t cublasDestroy(cublasHandle_t);
cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t);
cublasStatus_t cublasSetStream(cublasHandle_t, cudaStream_t);
cublasStatus_t cublasSetWorkspace(cublasHandle_t, void *, size_t);
const char *   cublasGetStatusString(cublasStatus_t);
cublasStatus_t cublasSgemm(cublasHandle_t, cublasOperation_t, cublasOperation_t, int m, int n, int k,
                           const float * alpha, const float * a, int lda, const float * b, int ldb,
                           const float * beta, float * c, int ldc);
cublasStatus_t cublasGemmEx(cublasHandle_t, cublasOperation_t, cublasOperation_t, int m, int n, int k,
                            const void * alpha, const void * a, cudaDataType, int lda,
                            const void * b, cudaDataType, int ldb,
                            const void * beta, void * c, cudaDataType, int ldc,
                            cublasComputeType_t, cublasGemmAlgo_t);
cublasStatus_t cublasGemmBatchedEx(cublasHandle_t, cublasOperation_t, cublasOperation_t, int m, int n, int k,
                                   const void * alpha, const void * const a[], cudaDataType, int lda,
                                   const void * const b[], cudaDataType, int ldb,
                                   const void * beta, void * const c[], cudaDataType, int ldc,
                                   int count, cublasComputeType_t, cublasGemmAlgo_t);
cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t, cublasOperation_t, cublasOperation_t, int m, int n, int k,
                                          const void * alpha, const void * a, cudaDataType, int lda, long long stride_a,
                                          const void * b, cudaDataType, int ldb, long long stride_b,
                                          const void * beta, void * c, cudaDataType, int ldc, long long stride_c,
                                          int count, cublasComputeType_t, cublasGemmAlgo_t);
}
