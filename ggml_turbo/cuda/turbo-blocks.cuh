#pragma once

// Where the bits of a block lie, and how to load them. Blocks are aligned to 2 bytes and no better.

#include "ggml-cuda/common.cuh"

#include "format/turbo-block.h"
#include "format/tables/turbo-types.h"

#define TURBO_FULL_WARP 0xffffffffu

// Orders the memory accesses of a warp. HIP's waves run in step, but its compiler does not know that.
static __device__ __forceinline__ void turbo_sync_warp() {
#if defined(GGML_USE_HIP)
    __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "wavefront");
    __builtin_amdgcn_wave_barrier();
#else
    __syncwarp();
#endif
}

// ---- whole words of bits ----

// N words of memory from p on, which is aligned to 2 bytes. Reads the aligned words that hold them, none beyond: at
// most 2 bytes before and after, in the same word as bytes that were asked for.
template<int N> static __device__ __forceinline__ void turbo_load_words(const void * p, uint32_t (&words)[N]) {
    const uintptr_t  address = (uintptr_t) p;
    const uint32_t * aligned = (const uint32_t *) (address & ~(uintptr_t) 3);
    const unsigned   shift   = (unsigned) (address & 2)*8;
    uint32_t         low     = aligned[0];
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const uint32_t high = aligned[shift ? i + 1 : i < N - 1 ? i + 1 : i];
        words[i] = __funnelshift_r(low, high, shift);
        low      = high;
    }
}

// Bits POS .. POS + N - 1 of up to three words, moved to bit TO: with N = 8 a state as an offset into a table of
// 2^TO-byte entries (turbo-table.cuh), with N = 8 + K those of two neighbours. All are constants: one shift and one
// mask.
template<int POS, int N, int TO>
static __device__ __forceinline__ uint32_t turbo_field(uint32_t w0, uint32_t w1, uint32_t w2) {
    constexpr int by = POS - TO; // to the right
    uint32_t      v;
    if constexpr (by < 0) {
        v = w0 << -by;
    } else if constexpr (by % 32 == 0) {
        v = by == 0 ? w0 : by == 32 ? w1 : w2;
    } else if constexpr (by < 32) {
        v = POS + N <= 32 ? w0 >> by : __funnelshift_r(w0, w1, by);
    } else if constexpr (by < 64) {
        v = POS + N <= 64 ? w1 >> (by - 32) : __funnelshift_r(w1, w2, by - 32);
    } else {
        v = w2 >> (by - 64);
    }
    return v & (((1u << N) - 1) << TO);
}

// ---- scale ----

// From the header, the first two bytes of a block; other bits above them are ignored.
template<int K> static __device__ __forceinline__ float turbo_block_scale(uint32_t header) {
    return __uint_as_float(turbo_scale_to_float(K, turbo_header_scale(K, (int) header)));
}

template<int K> static __device__ __forceinline__ float turbo_load_scale(const uint8_t * block) {
    return turbo_block_scale<K>(*(const uint16_t *) block);
}

// ---- one value ----

template<int K> static __device__ __forceinline__ int turbo_load_state(const uint8_t * block, int i) {
    const int byte = TURBO_STATE_BIT(K, i)/8;
    const int next = byte + 1 < TURBO_BLOCK_BYTES(K) ? block[byte + 1] : 0;
    return turbo_state(K, i, (uint32_t) (block[byte] | next << 8));
}
