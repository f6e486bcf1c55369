#pragma once

// The codebook in shared memory, as a kernel reads it. Every function that fills a table is called by all threads of a
// block; __syncthreads() before the first look-up.

#include "turbo-blocks.cuh"

#include "format/tables/turbo-tables.cuh"

static __device__ __forceinline__ int turbo_thread() {
    return (int) (threadIdx.x + blockDim.x*(threadIdx.y + blockDim.y*threadIdx.z));
}

static __device__ __forceinline__ int turbo_threads() {
    return (int) (blockDim.x*blockDim.y*blockDim.z);
}

// ---- one entry a look-up, as int8 or float: for kernels that memory bounds ----

template<int K, typename T> static __device__ __forceinline__ void turbo_fill_table(T (&table)[TURBO_STATES]) {
    for (int s = turbo_thread(); s < TURBO_STATES; s += turbo_threads()) {
        table[s] = (T) turbo_tables<K>::codebook()[s];
    }
}

// ---- one entry a look-up without bank conflicts: 32 KB, a copy of the table for each lane's bank ----

#define TURBO_BANKED_TABLE_WORDS (TURBO_STATES*32)

// Of state s, in word 32*s + lane: the entry of LOW as half below, that of HIGH above. 0: of no type, a half of zero.
template<int LOW, int HIGH> static __device__ __forceinline__ void turbo_fill_banked_table(uint32_t * table) {
    for (int i = turbo_thread(); i < TURBO_BANKED_TABLE_WORDS; i += turbo_threads()) {
        uint32_t bits = 0;
        if constexpr (LOW != 0) {
            bits |= __half_as_ushort(__float2half((float) turbo_tables<LOW>::codebook()[i/32]));
        }
        if constexpr (HIGH != 0) {
            bits |= (uint32_t) __half_as_ushort(__float2half((float) turbo_tables<HIGH>::codebook()[i/32])) << 16;
        }
        table[i] = bits;
    }
}

// How many words of shared memory are before the table: in the address of an entry, the lane and the table's place are
// put in with the mask, as one instruction, so the table's address must be a multiple of its size. begin: of the
// memory, in bytes.
static __host__ __device__ __forceinline__ int turbo_words_before_table(uint32_t begin) {
    return (int) ((0u - begin) % (4*TURBO_BANKED_TABLE_WORDS)/4);
}

// Where the shared memory of a block begins in its address space: behind what the system has there.
static __device__ __forceinline__ uint32_t turbo_shared_begin(const uint32_t * shared) {
#if defined(__CUDA_ARCH__) && !defined(GGML_USE_HIP)
    return (uint32_t) __cvta_generic_to_shared(shared);
#elif defined(SIMT)
    (void) shared;
    return simt::shared_begin;
#else
    (void) shared;
    return 0;
#endif
}

// A lane's view of the table.
struct turbo_banked_table {
#if defined(__CUDA_ARCH__) && !defined(GGML_USE_HIP)
    uint32_t own; // address of the entry of state 0

    // The shuffle changes nothing; but what comes from one the compiler keeps, instead of making it anew for each
    // entry.
    __device__ __forceinline__ turbo_banked_table(const uint32_t * table, int lane)
        : own(__shfl_sync(TURBO_FULL_WARP, (uint32_t) __cvta_generic_to_shared(table) | (uint32_t) lane << 2, lane)) {}

    // offset: a state as turbo_field<POS, 8, 7> gives it, state << 7.
    __device__ __forceinline__ uint32_t operator[](uint32_t offset) const {
        uint32_t entry; // not volatile: what offset comes from is loaded after the barrier that follows the filling
        asm("ld.shared.u32 %0, [%1];" : "=r"(entry) : "r"(offset | own));
        return entry;
    }
#else
    const uint8_t * own;

    __device__ __forceinline__ turbo_banked_table(const uint32_t * table, int lane)
        : own((const uint8_t *) (table + lane)) {}

    __device__ __forceinline__ uint32_t operator[](uint32_t offset) const { return *(const uint32_t *) (own + offset); }
#endif
};

// ---- two neighbours a look-up: 4, 8 or 16 KB, with bank conflicts ----

template<int K> constexpr int turbo_pair_table_words() {
    return TURBO_STATES << K;
}

// The entries of value i and i + 1 as half2, by the 8 + K bits that hold both states.
template<int K> static __device__ __forceinline__ void turbo_fill_pair_table(uint32_t * table) {
    const int8_t * codebook = turbo_tables<K>::codebook();
    for (int i = turbo_thread(); i < turbo_pair_table_words<K>(); i += turbo_threads()) {
        const uint32_t first  = __half_as_ushort(__float2half((float) codebook[i & (TURBO_STATES - 1)]));
        const uint32_t second = __half_as_ushort(__float2half((float) codebook[i >> K]));
        table[i] = first | second << 16;
    }
}

// offset: both states as turbo_field<POS, 8 + K, 2> gives them.
static __device__ __forceinline__ uint32_t turbo_pair(const uint32_t * table, uint32_t offset) {
    return *(const uint32_t *) ((const uint8_t *) table + offset);
}
