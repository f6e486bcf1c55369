// Blocks as kernels read them. format/README.md has the format, format/turbo-block.h its arithmetic.

#include "format/turbo-block.h"
#include "format/tables/turbo-tables.metal"
#include "metal/turbo-args.h"

using namespace metal;

constant int constant_type   [[function_constant(TURBO_CONSTANT_TYPE)]];
constant int constant_type_v [[function_constant(TURBO_CONSTANT_TYPE_V)]];
constant int constant_bits   [[function_constant(TURBO_CONSTANT_BITS)]];
constant int constant_index  [[function_constant(TURBO_CONSTANT_INDEX)]];
constant int constant_size_k [[function_constant(TURBO_CONSTANT_SIZE_K)]];
constant int constant_flags  [[function_constant(TURBO_CONSTANT_FLAGS)]];

// Arrays whose indices are constants then are registers.
#define TURBO_UNROLL _Pragma("clang loop unroll(full)")

static inline bool turbo_is_type(int type) {
    return type >= 2 && type <= 4;
}

static inline const constant char * turbo_codebook(int k) {
    return k == 2 ? turbo2_codebook : k == 3 ? turbo3_codebook : turbo4_codebook;
}

// Entries are exact in half. Reads by state from constant memory would wait for each other; so this is done once, and
// all other reads are of threadgroup memory. A barrier must follow.
static inline void turbo_copy_codebook(int k, threadgroup half * codebook, uint thread_number, uint n_threads) {
    if (turbo_is_type(k)) {
        for (uint s = thread_number; s < TURBO_STATES; s += n_threads) {
            codebook[s] = (half) turbo_codebook(k)[s];
        }
    }
}

// Values i to i + 3 of a block; i is a multiple of 4. Their states lie in two words of 16 bits, of the last ones in
// one.
static inline float4 turbo_block_values(int k, device const ushort * block, uint i, threadgroup const half * codebook) {
    const uint  bit   = TURBO_STATE_BIT(k, i), word = bit/16, last = TURBO_BLOCK_BYTES(k)/2 - 1;
    const uint  low   = block[word], high = block[min(word + 1, last)];
    const uint  bits  = (low | high << 16) >> bit % 16;
    const float scale = as_type<float>(turbo_scale_to_float(k, turbo_header_scale(k, (int) block[0])));
    float4 values;
    TURBO_UNROLL for (uint j = 0; j < 4; ++j) {
        values[j] = scale*(float) codebook[bits >> k*j & 255]; // turbo_value, whose entry is an integer
    }
    return values;
}

// Values d to d + 3 of a row of any type; d is a multiple of 4.
static inline float4 turbo_row_values(int type, device const char * row, uint d, threadgroup const half * codebook) {
    if (turbo_is_type(type)) {
        device const ushort * block = (device const ushort *) (row + d/QK_TURBO*TURBO_BLOCK_BYTES(type));
        return turbo_block_values(type, block, d % QK_TURBO, codebook);
    }
    if (type == TURBO_VALUES_Q8_0) { // 32 values: a scale in half, then bytes
        device const char * block = row + d/32*34;
        const float scale = (float) *(device const half *) block;
        device const char * x = block + 2 + d % 32;
        return float4(scale*(float) x[0], scale*(float) x[1], scale*(float) x[2], scale*(float) x[3]);
    }
    if (type == TURBO_VALUES_Q4_0) { // 32 values: a scale in half, then bytes, each of value i and value i + 16
        device const char * block = row + d/32*18;
        const float scale = (float) *(device const half *) block;
        device const uchar * x = (device const uchar *) block + 2 + d % 16;
        const uint shift = d % 32/16*4;
        return float4(scale*(float) ((int) (x[0] >> shift & 15) - 8), scale*(float) ((int) (x[1] >> shift & 15) - 8),
                      scale*(float) ((int) (x[2] >> shift & 15) - 8), scale*(float) ((int) (x[3] >> shift & 15) - 8));
    }
    if (type == TURBO_VALUES_F16) {
        device const half * x = (device const half *) row + d;
        return float4((float) x[0], (float) x[1], (float) x[2], (float) x[3]);
    }
    device const float * x = (device const float *) row + d;
    return float4(x[0], x[1], x[2], x[3]);
}

// Values `first` to first + 63 of TURBO_KEYS rows, as rows of a tile; of rows whose bit is not in `seen`, which may be
// no numbers, zeros. By 128 threads.
static inline void turbo_load_tile(int type, device const char * rows, ulong row_bytes, uint first, uint seen,
                                   threadgroup const half * codebook, threadgroup float * tile, uint thread_number) {
    const uint d = 4*(thread_number % 16);
    for (uint row = thread_number/16; row < TURBO_KEYS; row += 8) {
        float4 values = 0.0f;
        if (seen >> row & 1) {
            values = turbo_row_values(type, rows + row*row_bytes, first + d, codebook);
        }
        threadgroup float * to = tile + row*QK_TURBO + d;
        to[0] = values.x;
        to[1] = values.y;
        to[2] = values.z;
        to[3] = values.w;
    }
}

// Adds to sums[m] the products of rows 8*m to 8*m + 7 with the rows of a tile, of which a simdgroup has eight; of
// values `first` to first + 63. The rows are floats; this thread brings the rows 8*m + thread_number/16, which are at
// x + offset[m], to memory for TURBO_CHANNELS(M) values of each. By 128 threads. The tile may just have been written;
// ends with a barrier.
template <short M>
static inline void turbo_multiply_rows(device const char * x, thread const ulong * offset, uint first,
                                       threadgroup const float * tile, threadgroup float * memory,
                                       thread simdgroup_float8x8 * sums, uint thread_number, uint simd) {
    const short channels = TURBO_CHANNELS(M);
    for (short c = 0; c < QK_TURBO; c += channels) {
        TURBO_UNROLL for (short m = 0; m < M; ++m) {
            device const float * from = (device const float *) (x + offset[m]) + first + c;
            for (uint i = thread_number % 16; i < channels; i += 16) {
                memory[(thread_number/16 + 8*m)*channels + i] = from[i];
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (short i = 0; i < channels; i += 8) {
            simdgroup_float8x8 of_tile, of_rows;
            simdgroup_load(of_tile, tile + 8*simd*QK_TURBO + c + i, QK_TURBO, 0, true);
            TURBO_UNROLL for (short m = 0; m < M; ++m) {
                simdgroup_load(of_rows, memory + 8*m*channels + i, channels);
                simdgroup_multiply_accumulate(sums[m], of_rows, of_tile, sums[m]);
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
}
