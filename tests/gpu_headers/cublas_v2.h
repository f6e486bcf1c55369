#pragma once

// Types that llama.cpp's headers name, to compile kernels of ours where the CUDA toolkit has no cuBLAS. Nothing of it is
// called.

#include <cuda_runtime.h>

typedef struct cublasContext * cublasHandle_t;
typedef enum { CUBLAS_STATUS_SUCCESS } cublasStatus_t;
typedef enum { CUBLAS_OP_N, CUBLAS_OP_T } cublasOperation_t;
typedef enum { CUBLAS_TF32_TENSOR_OP_MATH } cublasMath_t;
cublasStatus_t cublasCreate(cublasHandle_t *);
cublasStatus_t cublasDestroy(cublasHandle_t);
cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t);
cublasStatus_t cublasSetStream(cublasHandle_t, cudaStream_t);
const char *   cublasGetStatusString(cublasStatus_t);
