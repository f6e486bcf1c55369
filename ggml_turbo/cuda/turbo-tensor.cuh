#pragma once

// A tensor as kernels are told of it, by values: where its data are, its shape and strides. Dimension 0 counts in units:
// blocks of 64 values for all tensors but those of indices.

#include "ggml-cuda/common.cuh"

#include <cstdint>

struct turbo_tensor {
    char *  data;
    int64_t ne[4]; // the first in units
    int64_t nb[4]; // bytes; the first from unit to unit
};

// Types of values.
enum turbo_float { TURBO_F32, TURBO_F16, TURBO_BF16 };

// Which rows of a tensor are meant: SET_ROWS and GET_ROWS have indices of 4 or 8 bytes; without data, all rows in order.
struct turbo_rows {
    turbo_tensor index; // dimension 0 in single indices
    int          bytes; // of an index
};

// Unit i of a tensor, counted over all dimensions.
struct turbo_position {
    int64_t i0, i1, i2, i3;
};
static __device__ __forceinline__ turbo_position turbo_find(const turbo_tensor & t, int64_t i) {
    const int64_t i1 = i/t.ne[0], i2 = i1/t.ne[1];
    return { i % t.ne[0], i1 % t.ne[1], i2 % t.ne[2], i2/t.ne[2] };
}

static __device__ __forceinline__ char * turbo_at(const turbo_tensor & t, turbo_position p) {
    return t.data + p.i0*t.nb[0] + p.i1*t.nb[1] + p.i2*t.nb[2] + p.i3*t.nb[3];
}

// The unit of `chosen` that belongs to unit i of `walked`: in the row that the index says, or the i-th of its own.
static __device__ __forceinline__ char * turbo_counterpart(const turbo_tensor & walked, const turbo_tensor & chosen,
                                                           const turbo_rows & rows, int64_t i) {
    if (!rows.index.data) {
        return turbo_at(chosen, turbo_find(chosen, i));
    }
    turbo_position p = turbo_find(walked, i);
    const char * index = turbo_at(rows.index, { p.i1, p.i2 % rows.index.ne[1], p.i3 % rows.index.ne[2], 0 });
    p.i1 = rows.bytes == 8 ? *(const int64_t *) index : *(const int32_t *) index;
    return turbo_at(chosen, p);
}

// Value i of those at p, which lie close together.
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
static void turbo_launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream, Arguments... arguments) {
#if defined(SIMT)
    (void) stream;
    simt::launch(grid, block, shared, [=] { kernel(arguments...); });
#else
    kernel<<<grid, block, shared, stream>>>(arguments...);
    CUDA_CHECK(cudaGetLastError());
#endif
}
