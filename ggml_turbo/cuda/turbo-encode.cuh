#pragma once

// The encoder: a block of 64 values by two warps, one for each candidate of the scale; the same bytes as
// format/turbo-reference.c, of which format/README.md has the steps. Compile without fast math: each float operation
// that is written here with a rounding is rounded once.
//
// Costs are exact floats in units of 1/64. With a target t and an entry e the step of turbo_path_cost is
//     ((t - 256e)^2 + 2^14) >> 15 = floor((A + G)/64),   A = (t^2 + 2^14) >> 9,   G = e*(128e - t)
// and all sums stay below 2^24. So a state takes three instructions: G, the sum with the best cost before it, the
// minimum. That an entry's distance saturates at 16 bits, which this leaves out, is put right afterwards where it may
// matter.

#include "turbo-table.cuh"
#include "turbo-tensor.cuh"

// f of the values that the lanes of a warp have, in all of them.
template<typename T, typename F> static __device__ __forceinline__ T turbo_warp_reduce(T value, F f) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        value = f(value, __shfl_xor_sync(TURBO_FULL_WARP, value, distance, 32));
    }
    return value;
}

static __device__ __forceinline__ unsigned turbo_warp_min(unsigned value) {
#if defined(SIMT_AMPERE) || (!defined(GGML_USE_HIP) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800)
    return __reduce_min_sync(TURBO_FULL_WARP, value);
#else
    return turbo_warp_reduce(value, [](unsigned a, unsigned b) { return a < b ? a : b; });
#endif
}

static __device__ __forceinline__ float turbo_warp_min(float value) {
    return turbo_warp_reduce(value, [](float a, float b) { return fminf(a, b); });
}

static __device__ __forceinline__ int turbo_warp_sum(int value) {
    return turbo_warp_reduce(value, [](int a, int b) { return a + b; });
}

// Rounded to nearest. HIP's __fsqrt_rn is not, its sqrtf is.
static __device__ __forceinline__ float turbo_sqrt(float x) {
#if defined(GGML_USE_HIP)
    return sqrtf(x);
#else
    return __fsqrt_rn(x);
#endif
}

static constexpr float turbo_cost_unit = 64.0f;
static constexpr float turbo_cost_base = 536870912.0f; // 2^29: the floats from here on are 64 apart

// turbo_cost_base + 64*floor(cost/64): the low bits of its mantissa are the cost in whole units.
static __device__ __forceinline__ float turbo_floor_cost(float cost) {
#if defined(GGML_USE_HIP) // has no additions with a direction, and a fast floor
    return floorf(cost*(1/turbo_cost_unit))*turbo_cost_unit + turbo_cost_base;
#else
    return __fadd_rd(cost, turbo_cost_base);
#endif
}

// What both warps share of a block.
template<int K> struct __align__(16) turbo_encode_shared {
    float    row[2][2][TURBO_SHARED(K)];              // costs before a value and after it, of each candidate
    uint16_t best[2][QK_TURBO][TURBO_SHARED(K)];      // in whole units, after each value
    float    target[2][QK_TURBO];
    float    error[2];
    uint8_t  state[QK_TURBO];
};

// The smallest costs after each value, in shared.best; returns the cost of the best path.
template<int K> static __device__ uint32_t turbo_search(turbo_encode_shared<K> & shared, int candidate, int lane) {
    // This lane has the states 8*lane + j. They lead to `outs` values of the bits that the next state shares, each from
    // `each` of them; or, if fewer than all that lead to one are here, to a part of one.
    constexpr int per_lane = TURBO_STATES/32, codes = TURBO_CODES(K), n_shared = TURBO_SHARED(K);
    constexpr int each = codes < per_lane ? codes : per_lane, outs = per_lane/each, lanes = codes/each;
    static_assert(n_shared % per_lane == 0, "the states of a lane differ in bits that they share with those before");

    float minus_e[per_lane], offset[per_lane]; // G = offset + minus_e*t
#pragma unroll
    for (int j = 0; j < per_lane; ++j) {
        const int e = turbo_tables<K>::codebook()[per_lane*lane + j];
        minus_e[j] = (float) -e;
        offset[j]  = (float) (128*e*e);
    }
    const int before = per_lane*lane % n_shared;
    for (int u = lane; u < n_shared; u += 32) {
        shared.row[candidate][0][u] = 0.0f; // every start is free
    }
    turbo_sync_warp();

    uint32_t total = 0;
#pragma unroll 2
    for (int i = 0; i < QK_TURBO; ++i) {
        const float * row  = shared.row[candidate][i & 1];
        const float   t    = shared.target[candidate][i];
        const int     ti   = (int) t;
        const float   a    = (float) ((uint32_t) (ti*ti + (1 << 14)) >> 9);
        // The largest step, (d*d + 2^14) >> 15 of the largest distance that 16 bits have on this side.
        const float most = turbo_cost_unit*(float) turbo_path_cost(0, ti >= 0 ? 32767 : -32768, 0);

        float best[per_lane];
#pragma unroll
        for (int j = 0; j < per_lane; ++j) {
            best[j] = row[before + j];
        }
        float next[outs], floored[outs];
#pragma unroll
        for (int o = 0; o < outs; ++o) {
            float step[each];
#pragma unroll
            for (int j = 0; j < each; ++j) {
                const int s = o*each + j;
                step[j] = __fadd_rn(__fmaf_rn(minus_e[s], t, offset[s]), best[s]);
            }
#pragma unroll
            for (int half = each/2; half > 0; half /= 2) { // a tree: a token waits for 64 of these in turn
#pragma unroll
                for (int j = 0; j < half; ++j) {
                    step[j] = fminf(step[j], step[j + half]);
                }
            }
            float cost = step[0];
#pragma unroll
            for (int distance = 1; distance < lanes; distance *= 2) {
                cost = fminf(cost, __shfl_xor_sync(TURBO_FULL_WARP, cost, distance, 32));
            }
            floored[o] = turbo_floor_cost(cost + a);
            if (floored[o] >= turbo_cost_base + most) { // rarely: a step may have been too long
                const int first = before/(each*lanes)*(each*lanes) + o*each;
                float     least = INFINITY;
                for (int j = 0; j < each*lanes; ++j) {
                    least = fminf(least, row[first + j]);
                }
                floored[o] = fminf(floored[o], (least + most) + turbo_cost_base);
            }
            floored[o] = fminf(floored[o], turbo_cost_base + turbo_cost_unit*65535.0f);
            next[o]    = floored[o] - turbo_cost_base;
        }
        if ((i + 1) % TURBO_RENORMALIZE == 0) {
            float least = next[0];
#pragma unroll
            for (int o = 1; o < outs; ++o) {
                least = fminf(least, next[o]);
            }
            least  = turbo_warp_min(least);
            total += (uint32_t) (least*(1/turbo_cost_unit));
#pragma unroll
            for (int o = 0; o < outs; ++o) {
                next[o]   -= least;
                floored[o] = next[o] + turbo_cost_base;
            }
        }
        if (lane % lanes == 0) {
#pragma unroll
            for (int o = 0; o < outs; ++o) {
                const int u = lane/lanes*outs + o;
                shared.row[candidate][~i & 1][u] = next[o];
                shared.best[candidate][i][u]     = (uint16_t) __float_as_uint(floored[o]);
            }
        }
        turbo_sync_warp();
    }
    return total;
}

// The states of the best path, in shared.state; ties go to the smaller state.
template<int K> static __device__ void turbo_traceback(turbo_encode_shared<K> & shared, int candidate, int lane) {
    int first = 0, n = TURBO_STATES; // what a state can be: n from `first` on
    for (int i = QK_TURBO - 1; i >= 0; --i) {
        const int target = (int) shared.target[candidate][i];
        unsigned  key    = ~0u; // cost and state
        for (int j = lane; j < n; j += 32) {
            const int s    = first + j;
            const int best = i == 0 ? 0 : shared.best[candidate][i - 1][s % TURBO_SHARED(K)];
            const int cost = turbo_path_cost(best, target, turbo_tables<K>::codebook()[s]);
            const unsigned own = (unsigned) cost*TURBO_STATES + (unsigned) s;
            key = own < key ? own : key;
        }
        const int state = (int) (turbo_warp_min(key) % TURBO_STATES);
        if (lane == 0) {
            shared.state[i] = (uint8_t) state;
        }
        first = turbo_first_before(K, state);
        n     = TURBO_CODES(K);
    }
    turbo_sync_warp();
}

// The code of the scale with which the chosen entries, of squared norm cc, have the norm of the values. The comparisons
// decide; what is before them comes within one code.
template<int K> static __device__ __forceinline__ int turbo_fit_scale(float energy, int cc, int code) {
    if (cc == 0) {
        return code;
    }
    const auto is_above = [=](int below) { // whether a code above this one has that scale
        const float end = __uint_as_float(turbo_scale_end(K, below));
        return energy >= __fmul_rn(__fmul_rn(end, end), (float) cc);
    };
    const int fitted = turbo_scale_from_float(K, __float_as_uint(turbo_sqrt(__fdiv_rn(energy, (float) cc))));
    if (fitted > 0 && !is_above(fitted - 1)) {
        return fitted - 1;
    }
    return fitted + (fitted < TURBO_SCALE_CODES(K) - 1 && is_above(fitted));
}

// What is encoded to where: values to rows that `rows` says, else to all in order.
struct turbo_encode_task {
    turbo_tensor values;
    turbo_float  type;
    turbo_tensor blocks;
    turbo_rows   rows;
};

// A block's values, and where it goes.
struct turbo_encode_place {
    const char * values;
    turbo_float  type;
    uint8_t *    block;
};

// Of block b of a task, counted over all rows.
static __device__ __forceinline__ turbo_encode_place turbo_find_block(const turbo_encode_task & task, uint32_t b) {
    const uint32_t  i    = b % task.values.ne[0], r = b/task.values.ne[0];
    const turbo_row from = turbo_find_row(task.values, r), to = turbo_other_row(task.rows, from, task.blocks, r);
    return { turbo_at(task.values, from, i), task.type, (uint8_t *) turbo_at(task.blocks, to, i) };
}

// One block, by 32 x 2 threads.
template<int K> static __device__ __forceinline__ void
turbo_encode_block(turbo_encode_shared<K> & shared, const turbo_encode_place & place) {
    const int lane = threadIdx.x, candidate = threadIdx.y;
    uint8_t * out  = place.block;

    // Without NaN, infinities and what overflows. Both halves of the warp have all 64 values.
    float value[4];
    int   largest = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        value[j] = turbo_load_float(place.type, place.values, lane % 16 + 16*j);
        largest  = turbo_largest(largest, __float_as_uint(value[j]));
    }
    largest = turbo_warp_reduce(largest, [](int a, int b) { return a > b ? a : b; });
    largest = largest < TURBO_MAX_INPUT ? largest : TURBO_MAX_INPUT;

    // The sum of squares, in the order of format/README.md: four terms a lane of 16, then halves onto halves.
    float energy = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        value[j] = __uint_as_float(turbo_sanitize(__float_as_uint(value[j]), largest));
        energy   = __fadd_rn(energy, __fmul_rn(value[j], value[j]));
    }
#pragma unroll
    for (int half = 8; half > 0; half /= 2) {
        energy = __fadd_rn(energy, __shfl_xor_sync(TURBO_FULL_WARP, energy, half, 32));
    }

    const float by_rms = __fmul_rn(turbo_sqrt(__fmul_rn(energy, 1.0f/QK_TURBO)), turbo_tables<K>::rms_to_scale);
    const float by_max = __fmul_rn(__uint_as_float((uint32_t) largest), turbo_tables<K>::max_to_scale);
    const float guess  = by_rms > by_max ? by_rms : by_max;
    const int   low    = turbo_scale_from_float(K, __float_as_uint(__fmul_rn(guess, 0.94f)));
    if (low == 0) { // the other candidate is not smaller
        for (int i = lane + 32*candidate; i < TURBO_BLOCK_BYTES(K); i += 64) {
            out[i] = 0;
        }
        return;
    }
    const int   code     = candidate ? turbo_scale_from_float(K, __float_as_uint(__fmul_rn(guess, 1.06f))) : low;
    const float scale    = __uint_as_float(turbo_scale_to_float(K, code));
    const float to_units = __fdiv_rn(256.0f, scale);
    if (lane < 16) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            shared.target[candidate][lane + 16*j] = rintf(turbo_limit_target(__fmul_rn(value[j], to_units)));
        }
    }

    const uint32_t cost = turbo_search<K>(shared, candidate, lane);
    if (lane == 0) {
        shared.error[candidate] = __fmul_rn((float) cost, __fmul_rn(scale, scale));
    }
    __syncthreads();
    if (candidate != (shared.error[1] < shared.error[0])) {
        return;
    }
    turbo_traceback<K>(shared, candidate, lane);

    int cc = 0;
    for (int i = lane; i < QK_TURBO; i += 32) {
        const int e = turbo_tables<K>::codebook()[shared.state[i]];
        cc += e*e;
    }
    const int fitted = turbo_fit_scale<K>(energy, turbo_warp_sum(cc), code);
    if (lane < QK_TURBO/8) { // eight codes, K bytes
        uint32_t codes = 0;
        for (int j = 0; j < 8; ++j) {
            codes |= (uint32_t) turbo_state_code(K, shared.state[8*lane + j]) << K*j;
        }
        for (int j = 0; j < K; ++j) {
            out[TURBO_HEADER_BITS/8 + K*lane + j] = (uint8_t) (codes >> 8*j);
        }
    } else if (lane == QK_TURBO/8) {
        *(uint16_t *) out = (uint16_t) turbo_header(K, fitted, shared.state[0]);
    }
}

// A block of threads for each block of the task.
template<int K> static __global__ void __launch_bounds__(64) turbo_encode(turbo_encode_task task) {
    __shared__ turbo_encode_shared<K> shared;
    turbo_encode_block<K>(shared, turbo_find_block(task, blockIdx.x));
}

// Two tasks, of any types of so many bits: n_first blocks of the first, and behind them those of the second.
static __global__ void __launch_bounds__(64)
turbo_encode_two(turbo_encode_task first, int bits_first, turbo_encode_task second, int bits_second, uint32_t n_first) {
    __shared__ union {
#define TURBO_SHARED_OF(K, ID) turbo_encode_shared<K> of##K;
        TURBO_TYPES(TURBO_SHARED_OF)
#undef TURBO_SHARED_OF
    } shared;
    const bool is_first = blockIdx.x < n_first;
    const turbo_encode_place place =
        is_first ? turbo_find_block(first, blockIdx.x) : turbo_find_block(second, blockIdx.x - n_first);
    switch (is_first ? bits_first : bits_second) {
#define TURBO_ENCODE(K, ID) case K: turbo_encode_block<K>(shared.of##K, place); break;
        TURBO_TYPES(TURBO_ENCODE)
#undef TURBO_ENCODE
    }
}
