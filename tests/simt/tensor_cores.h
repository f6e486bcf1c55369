#pragma once

// What attention kernels have of a GPU beyond CUDA's language: the product of small tiles, and asynchronous copies.
// Include before the kernels.

#include "cuda.h"

#include <deque>
#include <vector>

namespace simt {

// C += A*B as in cuda/turbo-mma.cuh: a lane's parts of A and B meet those of the others. Sums are rounded once.
struct mma_operands {
    uint32_t a[4], b[2];
};

inline double half_of(uint32_t pair, int i) {
    return (double) (float) simt_bits<half>((uint16_t) (pair >> 16*(i & 1)));
}

} // namespace simt

namespace simt {
// Where dynamic shared memory begins in its address space. Kernels whose tables must lie at multiples of their size
// ask.
inline uint32_t shared_begin = 0;

inline bool copies_are_late = true; // see below
} // namespace simt

#if !defined(SIMT_AMD) // whose GPUs have neither

#define TURBO_HAS_MMA
inline void turbo_mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_WHERE) {
    using namespace simt;
    const given<mma_operands> all = meet(~0u, mma_operands{ { a[0], a[1], a[2], a[3] }, { b0, b1 } }, where);
    const unsigned g = lane()/4, t = lane() % 4;
    double rows[2][16], columns[2][16];
    for (unsigned from = 0; from < 4; ++from) {
        const mma_operands row = all[4*g + from];
        for (int k = 0; k < 4; ++k) {
            const unsigned term = 2*from + k/2*8 + k % 2;
            rows[0][term] = half_of(row.a[k/2*2],     k);
            rows[1][term] = half_of(row.a[k/2*2 + 1], k);
            columns[0][term] = half_of(all[4*(2*t) + from].b[k/2],     k);
            columns[1][term] = half_of(all[4*(2*t + 1) + from].b[k/2], k);
        }
    }
    for (int i = 0; i < 4; ++i) {
        double sum = c[i];
        for (int k = 0; k < 16; ++k) {
            sum += rows[i/2][k]*columns[i % 2][k];
        }
        c[i] = (float) sum;
    }
}

// Asynchronous copies are done when they are begun, or when they are waited for: whatever else is done to their memory
// between the two is wrong in one of the modes.
namespace simt {

struct copy {
    uint32_t *       to;
    const uint32_t * from;
};
struct copies {
    dim3                          block;
    std::deque<std::vector<copy>> groups; // the last one is not ended
};
static std::vector<copies> all_copies(1024); // not inline: that takes a lock, which checked accesses do not know

inline copies & own_copies() {
    copies & own = all_copies[thread_number()];
    const dim3 & b = current.block_index;
    if (own.groups.empty() || own.block.x != b.x || own.block.y != b.y || own.block.z != b.z) {
        own.block = b;
        own.groups.assign(1, {});
    }
    return own;
}

} // namespace simt

#define TURBO_HAS_ASYNC_COPY
inline void turbo_copy_async(uint32_t * to, const char * from) {
    const uint32_t * word = (const uint32_t *) from;
    if (simt::copies_are_late) {
        simt::own_copies().groups.back().push_back({ to, word });
    } else {
        *to = *word;
    }
}
inline void turbo_copy_quad_async(uint32_t * to, const uint32_t * from) {
    if (((uintptr_t) to | (uintptr_t) from) % 16 != 0) {
        simt::fail("copies 16 bytes that are not aligned");
    }
    for (int i = 0; i < 4; ++i) {
        turbo_copy_async(to + i, (const char *) (from + i));
    }
}
inline void turbo_commit_copies() { simt::own_copies().groups.emplace_back(); }
inline void turbo_wait_for_copies() {
    auto & groups = simt::own_copies().groups;
    while (groups.size() > 2) { // the one that is not ended, and the latest that is
        for (const simt::copy & c : groups.front()) {
            *c.to = *c.from;
        }
        groups.pop_front();
    }
}

#endif
