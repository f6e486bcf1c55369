#pragma once

// Blocks to values, and blocks to where other blocks are.

#include "turbo-table.cuh"
#include "turbo-tensor.cuh"

static constexpr int turbo_rows_threads = 256;

// The values of n blocks, a warp a block: for GET_ROWS from the rows that `rows` says, else all of them.
template<int K, typename T> static __global__ void __launch_bounds__(turbo_rows_threads)
turbo_decode(turbo_tensor blocks, turbo_tensor values, turbo_rows rows, int64_t n) {
    __shared__ float table[TURBO_STATES];
    turbo_fill_table<K>(table);
    __syncthreads();
    constexpr int warps = turbo_rows_threads/32;
    const int     lane  = threadIdx.x % 32;
    for (int64_t i = (int64_t) blockIdx.x*warps + threadIdx.x/32; i < n; i += (int64_t) gridDim.x*warps) {
        const uint8_t * block = (const uint8_t *) turbo_counterpart(values, blocks, rows, i);
        T *             out   = (T *) turbo_at(values, turbo_find(values, i));
        const float     scale = turbo_load_scale<K>(block);
#pragma unroll
        for (int j = lane; j < QK_TURBO; j += 32) {
            out[j] = turbo_to<T>(scale*table[turbo_load_state<K>(block, j)]);
        }
    }
}

// n blocks of so many pairs of bytes, a thread a pair.
static __global__ void __launch_bounds__(turbo_rows_threads)
turbo_copy(turbo_tensor from, turbo_tensor to, int pairs, int64_t n) {
    const int64_t step = (int64_t) gridDim.x*turbo_rows_threads;
    for (int64_t j = (int64_t) blockIdx.x*turbo_rows_threads + threadIdx.x; j < n*pairs; j += step) {
        const uint16_t * in = (const uint16_t *) turbo_at(from, turbo_find(from, j/pairs));
        ((uint16_t *) turbo_at(to, turbo_find(to, j/pairs)))[j % pairs] = in[j % pairs];
    }
}
