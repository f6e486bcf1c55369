#pragma once

// Blocks to values, and blocks to where other blocks are. A grid is units by rows; both go on from where it ends.

#include "turbo-table.cuh"
#include "turbo-tensor.cuh"

static constexpr int turbo_rows_threads = 256;

// The values of blocks, a warp a block: of the rows that `rows` says, else of all.
template<int K, typename T> static __global__ void __launch_bounds__(turbo_rows_threads)
turbo_decode(turbo_tensor blocks, turbo_tensor values, turbo_rows rows, uint32_t n_rows) {
    __shared__ float table[TURBO_STATES];
    turbo_fill_table<K>(table);
    __syncthreads();
    constexpr uint32_t warps = turbo_rows_threads/32;
    const int          lane  = threadIdx.x % 32;
    for (uint32_t r = blockIdx.y; r < n_rows; r += gridDim.y) {
        const turbo_row to = turbo_find_row(values, r), from = turbo_other_row(rows, to, blocks, r);
        for (uint32_t i = blockIdx.x*warps + threadIdx.x/32; i < values.ne[0]; i += gridDim.x*warps) {
            const uint8_t * block = (const uint8_t *) turbo_at(blocks, from, i);
            T *             out   = (T *) turbo_at(values, to, i);
            const float     scale = turbo_load_scale<K>(block);
#pragma unroll
            for (int j = lane; j < QK_TURBO; j += 32) {
                out[j] = turbo_to<T>(scale*table[turbo_load_state<K>(block, j)]);
            }
        }
    }
}

// Rows of so many pairs of bytes, a thread a pair.
static __global__ void __launch_bounds__(turbo_rows_threads)
turbo_copy(turbo_tensor from, turbo_tensor to, uint32_t pairs, uint32_t n_rows) {
    for (uint32_t r = blockIdx.y; r < n_rows; r += gridDim.y) {
        const uint16_t * in  = (const uint16_t *) turbo_at(from, turbo_find_row(from, r));
        uint16_t *       out = (uint16_t *) turbo_at(to, turbo_find_row(to, r));
        for (uint32_t i = blockIdx.x*turbo_rows_threads + threadIdx.x; i < pairs; i += gridDim.x*turbo_rows_threads) {
            out[i] = in[i];
        }
    }
}
