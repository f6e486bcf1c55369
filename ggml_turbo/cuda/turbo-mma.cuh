#pragma once

// The product of small tiles that attention is made of, in half precision with float sums:
// C (16 x 8) += A (16 x 16) * B.
//
// Lane 4*g + t of a warp has of A the rows g and g + 8, of B the column g, and of C rows g and g + 8 of columns 2t and
// 2t + 1:
//
//     a[0]: A[g][2t, 2t + 1]      a[1]: A[g + 8][2t, 2t + 1]      a[2], a[3]: the same of columns 2t + 8, 2t + 9
//     b0:   B[2t, 2t + 1][g]      b1:   B[2t + 8, 2t + 9][g]
//     c[0], c[1]: C[g][2t], C[g][2t + 1]                          c[2], c[3]: the same of row g + 8
//
// NVIDIA has it as one instruction from compute capability 8.0 on, as two in 7.5. Elsewhere, on older devices and AMD's
// for now, lanes hand the halves around: right, and not fast.

#include "turbo-blocks.cuh"

static __device__ __forceinline__ float turbo_low_half(uint32_t x) {
    return __half2float(__ushort_as_half((unsigned short) (x & 0xffff)));
}

static __device__ __forceinline__ float turbo_high_half(uint32_t x) {
    return __half2float(__ushort_as_half((unsigned short) (x >> 16)));
}

static __device__ __forceinline__ uint32_t turbo_pack_halves(float low, float high) {
    return (uint32_t) __half_as_ushort(__float2half(low)) | (uint32_t) __half_as_ushort(__float2half(high)) << 16;
}

#if !defined(TURBO_HAS_MMA) // the emulator has its own
#  if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 750 && !defined(GGML_USE_HIP)
#    define TURBO_HAS_MMA

static __device__ __forceinline__ void turbo_mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

#  endif
#endif

#if !defined(TURBO_HAS_MMA)

static __device__ __forceinline__ void turbo_mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const int lane = threadIdx.x % 32, t = lane % 4;
    const uint32_t b[2] = { b0, b1 };
#pragma unroll 1 // else the loads of many products go side by side, and registers run out
    for (int from = 0; from < 4; ++from) { // the lane of a row or column that has the terms 2*from, 2*from + 1 and 8 on
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const uint32_t row[2] = { (uint32_t) __shfl_sync(TURBO_FULL_WARP, (int) a[2*k],     lane - t + from, 32),
                                      (uint32_t) __shfl_sync(TURBO_FULL_WARP, (int) a[2*k + 1], lane - t + from, 32) };
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const uint32_t column = (uint32_t) __shfl_sync(TURBO_FULL_WARP, (int) b[k], 4*(2*t + j) + from, 32);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    c[2*i + j] += turbo_low_half(row[i])*turbo_low_half(column);
                    c[2*i + j] += turbo_high_half(row[i])*turbo_high_half(column);
                }
            }
        }
    }
}

#endif
