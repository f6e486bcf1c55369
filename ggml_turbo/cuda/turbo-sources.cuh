#pragma once

// Keys and values as attention reads them: packed blocks that wait in shared memory, and stock types straight from
// global memory. Either gives the halves that a lane holds of a tile (turbo-mma.cuh), and a float that they are
// multiplied with.
//
// A chunk is 64 values of a head, a turbo block. The channels of a chunk take an order that suits the lanes, the same
// in queries and keys, so that products do not change:
//
//     keys     lane 4*g + t has the 16 values from 16*t on of key g; product i takes 4 of them, as its columns
//              2t, 2t + 1, 2t + 8 and 2t + 9
//     values   the 8 values from 8*g on, of keys 2t, 2t + 1, 2t + 8 and 2t + 9; product j has value 8*g + j in
//              its column g

#include "turbo-table.cuh"
#include "turbo-mma.cuh"

#define TURBO_TILE_KEYS 16 // that a warp takes at a time

#include <utility>

// f(0), f(1), ... with constants as arguments.
template<int I> struct turbo_constant {
    static constexpr int value = I;
    __host__ __device__ constexpr operator int() const { return I; }
};
template<typename F, int... I>
static __device__ __forceinline__ void turbo_each(std::integer_sequence<int, I...>, F && f) {
    (f(turbo_constant<I>()), ...);
}
template<int N, typename F> static __device__ __forceinline__ void turbo_each(F && f) {
    turbo_each(std::make_integer_sequence<int, N>(), f);
}

// ---- copies from global to shared memory that go on while a warp does something else ----

#if !defined(TURBO_HAS_ASYNC_COPY) // the emulator has its own
#  if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800 && !defined(GGML_USE_HIP)

static __device__ __forceinline__ void turbo_copy_async(uint32_t * to, const char * from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;"
        :: "r"((uint32_t) __cvta_generic_to_shared(to)), "l"(from) : "memory");
}

// Four words, aligned to 16 bytes.
static __device__ __forceinline__ void turbo_copy_quad_async(uint32_t * to, const uint32_t * from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
        :: "r"((uint32_t) __cvta_generic_to_shared(to)), "l"(from) : "memory");
}

// Ends a group of copies.
static __device__ __forceinline__ void turbo_commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for the copies of this thread but for those of the latest group.
static __device__ __forceinline__ void turbo_wait_for_copies() {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
}

#  else

static __device__ __forceinline__ void turbo_copy_async(uint32_t * to, const char * from) {
    *to = *(const uint32_t *) from;
}

static __device__ __forceinline__ void turbo_copy_quad_async(uint32_t * to, const uint32_t * from) {
    *(uint4 *) to = *(const uint4 *) from;
}

static __device__ __forceinline__ void turbo_commit_copies() {}

static __device__ __forceinline__ void turbo_wait_for_copies() {}

#  endif
#endif

// ---- packed blocks ----

// turbo_block_scale by one multiplication: the code as the top of a float, which is 2^87 times too small. Scales below
// 2^-39, which would be denormal there, count as 0 or as up to 2^-40 less, a 10^-10th of a value's unit at most.
template<int K> static __device__ __forceinline__ float turbo_multiplied_scale(uint32_t header) {
    const uint32_t bits = header << (23 - TURBO_SCALE_MANTISSA(K)) & (uint32_t) (TURBO_SCALE_CODES(K) - 1)
                                                                         << (23 - TURBO_SCALE_MANTISSA(K));
    return __uint_as_float(bits)*__uint_as_float((127u + 127u - TURBO_SCALE_BIAS) << 23);
}

// Rows of CHUNKS blocks each, one for a key, staged in shared memory as they lie in global memory from the last
// multiple of 4 bytes on. A single block may begin 2 bytes after that; two blocks do not (turbo-plan.cuh chooses by
// alignment).
template<int K, int CHUNKS> struct turbo_staged {
    static constexpr int  bytes   = CHUNKS*TURBO_BLOCK_BYTES(K);
    static constexpr bool aligned = CHUNKS % 2 == 0;
    static constexpr int  words   = (bytes + (aligned ? 0 : 2) + 3)/4; // of a row
    static_assert(!aligned || bytes % 4 == 0, "the rows of pairs of blocks are whole words");

    // Bit of a row at which value i of a chunk begins, in a row that begins `odd` halves of a word late.
    static constexpr __host__ __device__ int begin(int chunk, int i, int odd = 0) {
        return 16*odd + 8*TURBO_BLOCK_BYTES(K)*chunk + TURBO_STATE_BIT(K, i);
    }

    // A warp copies `keys` rows of 16 at most, from row `first` on, with 32 bits for where they are; the last one
    // stands in for those that are not there.
    static __device__ __forceinline__ void
    copy(uint32_t * to, const char * from, uint32_t stride, int first, int keys, int lane) {
        if (keys >= 16) {
            copy_rows(to, from, first*stride, lane, [&](int row) { return row*stride; });
        } else {
            copy_rows(to, from, first*stride, lane, [&](int row) { return (row < keys ? row : keys - 1)*stride; });
        }
    }

    // N states from bit `start` of the words on, as look-ups of entries.
    template<int start, int N>
    static __device__ __forceinline__ void
    look_up(const turbo_banked_table & table, uint32_t w0, uint32_t w1, uint32_t w2, uint32_t (&u)[N]) {
        turbo_each<N>([&](auto i) {
            u[i] = table[turbo_field<start + K*decltype(i)::value, 8, 7>(w0, w1, w2)];
        });
    }

    // The entries of values N*part .. N*part + N - 1 of a chunk.
    template<int chunk, int N>
    static __device__ __forceinline__ void
    entries(const uint32_t * row, const turbo_banked_table & table, int part, int odd, uint32_t (&u)[N]) {
        constexpr int step = N*K, first = begin(chunk, 0);
        if constexpr (aligned && step % 32 == 0) { // each part begins at the same bit of a word
            const uint32_t * w = row + first/32 + step/32*part;
            constexpr int start = first % 32, end = start + (N - 1)*K + 8;
            look_up<start>(table, w[0], w[1], end > 64 ? w[2] : 0, u);
        } else { // shifted to where they fill no more words than they must; from bit 7 on, states go to the right
            constexpr int bits = (N - 1)*K + 8, x = (bits + 31)/32, start = 32*x - bits < 7 ? 32*x - bits : 7,
                          end = start + bits + 31;
            const unsigned at = (unsigned) (first - start + 16*odd + step*part);
            const uint32_t * w = row + at/32;
            const uint32_t w1 = w[1], w2 = end > 64 ? w[2] : 0, w3 = end > 96 ? w[3] : 0;
            look_up<start>(table, __funnelshift_r(w[0], w1, at), x > 1 ? __funnelshift_r(w1, w2, at) : 0,
                           x > 2 ? __funnelshift_r(w2, w3, at) : 0, u);
        }
    }

    template<int chunk> static __device__ __forceinline__ float scale(const uint32_t * row, int odd) {
        return turbo_multiplied_scale<K>(((const uint16_t *) row)[odd + chunk*TURBO_BLOCK_BYTES(K)/2]);
    }

  private:
    // Eight lanes copy a row, so that neighbours read neighbouring words and a lane has few rows to find.
    template<typename F>
    static __device__ __forceinline__ void
    copy_rows(uint32_t * to, const char * from, uint32_t first, int lane, F && offset) {
        constexpr int rest = words % 8;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = 4*i + lane/8, column = lane % 8;
            const char * p = from + (first + offset(row));
#pragma unroll
            for (int j = 0; j < words/8; ++j) {
                copy_word(to + row*words + column, p, column, 8*j);
            }
            if (rest > 1 && column < rest) {
                copy_word(to + row*words + column, p, column, words - rest);
            }
        }
        if (rest == 1 && lane < TURBO_TILE_KEYS) { // the last word of each row
            copy_word(to + lane*words, from + (first + offset(lane)), 0, words - 1);
        }
    }

    // Word column + more of a row; `to` is where word `column` goes. Words that a row shares with what is beside it
    // are copied whole: no allocation of a device ends within one.
    static __device__ __forceinline__ void copy_word(uint32_t * to, const char * row, int column, int more) {
        const char * first = aligned ? row : (const char *) ((uintptr_t) row & ~(uintptr_t) 3);
        turbo_copy_async(to + more, first + 4*column + 4*more);
    }
};

// ---- stock types ----

enum turbo_stock { TURBO_STOCK_F32, TURBO_STOCK_F16, TURBO_STOCK_BF16, TURBO_STOCK_Q8_0, TURBO_STOCK_Q4_0 };

static __device__ __forceinline__ uint32_t turbo_half_word(const char * p) {
    return *(const uint16_t *) p;
}

static __device__ __forceinline__ uint32_t turbo_word(const char * p, bool aligned) {
    return aligned ? *(const uint32_t *) p : turbo_half_word(p) | turbo_half_word(p + 2) << 16;
}

// aligned: whether words are, to 4 bytes; all is to 2.
//
// N values from channel `first` on of a head at p, and a bound of the magnitudes of the whole chunk: for floats, of
// the N.
template<int N>
static __device__ __forceinline__ float
turbo_load_stock(turbo_stock type, bool aligned, const char * p, int first, float (&x)[N]) {
    constexpr int n = 32;                                    // values of a block of q8_0 or q4_0
    const int     bytes = type == TURBO_STOCK_Q8_0 ? 2 + n : 2 + n/2; // of a block
    const char *  block = p + first/n*bytes;
    float         bound = 0.0f;
    if (type == TURBO_STOCK_Q8_0 || type == TURBO_STOCK_Q4_0) {
        const char * chunk = p + first/QK_TURBO*2*bytes;
        const float  d     = turbo_low_half(turbo_half_word(block));
        bound =
            fmaxf(fabsf(turbo_low_half(turbo_half_word(chunk))), fabsf(turbo_low_half(turbo_half_word(chunk + bytes))));
#pragma unroll
        for (int i = 0; i < N; i += 2) {
            const int at = first % n + i;
            if (type == TURBO_STOCK_Q8_0) {
                const uint32_t pair = turbo_half_word(block + 2 + at);
                x[i]     = d*(float) (int8_t) (pair & 255);
                x[i + 1] = d*(float) (int8_t) (pair >> 8);
            } else {
                const uint32_t pair = turbo_half_word(block + 2 + at % 16) >> (at < 16 ? 0 : 4);
                x[i]     = d*(float) ((int) (pair & 15) - 8);
                x[i + 1] = d*(float) ((int) (pair >> 8 & 15) - 8);
            }
        }
        return bound;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const uint32_t bits = type == TURBO_STOCK_F32 ? turbo_word(p + 4*(first + i), aligned)
                                                      : turbo_half_word(p + 2*(first + i)) << 16;
        x[i]  = __uint_as_float(bits);
        bound = fmaxf(bound, fabsf(x[i]));
    }
    return bound;
}

// The power of two that is not above a magnitude, and its inverse: halves reach far enough around what is divided by
// it.
struct turbo_unit {
    float value, inverse;
};
static __device__ __forceinline__ turbo_unit turbo_unit_of(float magnitude) {
    const uint32_t exponent = __float_as_uint(magnitude) >> 23 & 255;
    const uint32_t e = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
    return { __uint_as_float(e << 23), __uint_as_float((254 - e) << 23) };
}

// N halves from channel `first` on of a head, in pairs, divided by the number that is returned. What the lanes whose
// numbers differ in `lanes` read makes the chunk.
template<int N>
static __device__ __forceinline__ float turbo_stock_halves(turbo_stock type, bool aligned, const char * p, int first,
                                                           unsigned lanes, uint32_t (&halves)[N/2]) {
    if (type == TURBO_STOCK_F16) {
#pragma unroll
        for (int i = 0; i < N/2; ++i) {
            halves[i] = turbo_word(p + 2*first + 4*i, aligned);
        }
        return 1.0f;
    }
    float x[N], bound = turbo_load_stock(type, aligned, p, first, x);
    if (type == TURBO_STOCK_F32 || type == TURBO_STOCK_BF16) {
#pragma unroll
        for (unsigned distance = 1; distance < 32; distance *= 2) {
            if (lanes & distance) {
                bound = fmaxf(bound, __shfl_xor_sync(TURBO_FULL_WARP, bound, (int) distance, 32));
            }
        }
    }
    const turbo_unit unit = turbo_unit_of(bound);
#pragma unroll
    for (int i = 0; i < N/2; ++i) {
        halves[i] = turbo_pack_halves(x[2*i]*unit.inverse, x[2*i + 1]*unit.inverse);
    }
    return unit.value;
}
