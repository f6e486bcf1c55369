#pragma once

// A tensor as kernels are told of it, by values, and how they are launched. Its rows lie side by side: of blocks, or of
// values in pieces of 64; both are the units of dimension 0. A tensor of indices has single ones.

#include "ggml-cuda/common.cuh"

#include <cstdint>

struct turbo_tensor {
    char *   data;
    uint32_t ne[4]; // units, rows, ...
    int64_t  nb[4]; // bytes
};

// Which rows are meant: SET_ROWS and GET_ROWS have indices of 4 or 8 bytes; without data, all rows in order.
struct turbo_rows {
    turbo_tensor index;
    int          bytes; // of an index
};

struct turbo_row {
    uint32_t i1, i2, i3;
};

// Row r, counted over dimensions 1 to 3.
static __device__ __forceinline__ turbo_row turbo_find_row(const turbo_tensor & t, uint32_t r) {
    const uint32_t i2 = r/t.ne[1];
    return { r % t.ne[1], i2 % t.ne[2], i2/t.ne[2] };
}

// The row of `other` that belongs to row r of a tensor, which is `row` there: the one that the index says, or its r-th.
static __device__ __forceinline__ turbo_row turbo_other_row(const turbo_rows & rows, turbo_row row,
                                                            const turbo_tensor & other, uint32_t r) {
    const turbo_tensor & index = rows.index;
    if (!index.data) {
        return turbo_find_row(other, r);
    }
    const int64_t at = row.i1*index.nb[0] + row.i2 % index.ne[1]*index.nb[1] + row.i3 % index.ne[2]*index.nb[2];
    const char *  p  = index.data + at;
    return { (uint32_t) (rows.bytes == 8 ? *(const int64_t *) p : *(const int32_t *) p), row.i2, row.i3 };
}

static __device__ __forceinline__ char * turbo_at(const turbo_tensor & t, turbo_row row, uint32_t i0 = 0) {
    return t.data + i0*t.nb[0] + row.i1*t.nb[1] + row.i2*t.nb[2] + row.i3*t.nb[3];
}

// ---- values that are not ours ----

enum turbo_float { TURBO_F32, TURBO_F16, TURBO_BF16 };

// Value i of those at p.
static __device__ __forceinline__ float turbo_load_float(turbo_float type, const char * p, int i) {
    switch (type) {
        case TURBO_F16:  return __half2float(((const half *) p)[i]);
        case TURBO_BF16: return __uint_as_float((uint32_t) ((const uint16_t *) p)[i] << 16);
        default:         return ((const float *) p)[i];
    }
}

template<typename T> static __device__ __forceinline__ T turbo_to(float x);
template<> __device__ __forceinline__ float       turbo_to<float>(float x)       { return x; }
template<> __device__ __forceinline__ half        turbo_to<half>(float x)        { return __float2half(x); }
template<> __device__ __forceinline__ nv_bfloat16 turbo_to<nv_bfloat16>(float x) { return __float2bfloat16(x); }

// ---- on the host ----

// shared: bytes of dynamic shared memory.
template<typename... Parameters, typename... Arguments>
static void turbo_launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                         Arguments... arguments) {
#if defined(SIMT)
    (void) stream;
    simt::launch(grid, block, shared, [=] { kernel(arguments...); });
#else
    kernel<<<grid, block, shared, stream>>>(arguments...);
    CUDA_CHECK(cudaGetLastError());
#endif
}
