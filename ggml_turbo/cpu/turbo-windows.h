#pragma once

// How 16-byte shuffles gather the windows of a block, for instruction sets without per-lane bit shifts of bytes.
//
// 16 values have their windows in 2k+1 bytes. A 16-byte load at turbo_window_load holds them for one group of
// 16 values; two shuffles bring the two bytes around each window into a 16-bit lane, for the 8 even and the 8 odd
// values of the group; a multiplication shifts the window into the lane's high byte.

#include "ggml-turbo.h"

#define TURBO_WINDOW_BIT(K, i)     (8 + (K)*((i) + 1))
#define TURBO_WINDOW_LAST(K)       (TURBO_BLOCK_BYTES(K) - 16) // loads end with the block at the latest
#define TURBO_WINDOW_LOAD(K, g)    (1 + 2*(K)*(g) < TURBO_WINDOW_LAST(K) ? 1 + 2*(K)*(g) : TURBO_WINDOW_LAST(K))

#define TURBO_WINDOW_BYTE(K, g, i) (TURBO_WINDOW_BIT(K, 16*(g) + (i))/8 - TURBO_WINDOW_LOAD(K, g))
#define TURBO_WINDOW_NEXT(b)       ((b) < 15 ? (b) + 1 : 0x80) // past the block: that window is one whole byte
#define TURBO_WINDOW_PAIR(K, g, i) TURBO_WINDOW_BYTE(K, g, i), TURBO_WINDOW_NEXT(TURBO_WINDOW_BYTE(K, g, i))
#define TURBO_WINDOW_GROUP(K, g, odd) {                                                                  \
    TURBO_WINDOW_PAIR(K, g,  0 + odd), TURBO_WINDOW_PAIR(K, g,  2 + odd), TURBO_WINDOW_PAIR(K, g,  4 + odd), \
    TURBO_WINDOW_PAIR(K, g,  6 + odd), TURBO_WINDOW_PAIR(K, g,  8 + odd), TURBO_WINDOW_PAIR(K, g, 10 + odd), \
    TURBO_WINDOW_PAIR(K, g, 12 + odd), TURBO_WINDOW_PAIR(K, g, 14 + odd) }
#define TURBO_WINDOW_GROUPS(K, odd) {                                         \
    TURBO_WINDOW_GROUP(K, 0, odd), TURBO_WINDOW_GROUP(K, 1, odd), \
    TURBO_WINDOW_GROUP(K, 2, odd), TURBO_WINDOW_GROUP(K, 3, odd) }

#define TURBO_WINDOW_FACTOR(K, i)    (1 << (8 - TURBO_WINDOW_BIT(K, i) % 8))
#define TURBO_WINDOW_FACTORS(K, odd) {                                                                      \
    TURBO_WINDOW_FACTOR(K, 0 + odd), TURBO_WINDOW_FACTOR(K,  2 + odd), TURBO_WINDOW_FACTOR(K,  4 + odd), \
    TURBO_WINDOW_FACTOR(K, 6 + odd), TURBO_WINDOW_FACTOR(K,  8 + odd), TURBO_WINDOW_FACTOR(K, 10 + odd), \
    TURBO_WINDOW_FACTOR(K, 12 + odd), TURBO_WINDOW_FACTOR(K, 14 + odd) }

// [k - 2][odd][group]
static const uint8_t turbo_window_bytes[3][2][4][16] = {
    { TURBO_WINDOW_GROUPS(2, 0), TURBO_WINDOW_GROUPS(2, 1) },
    { TURBO_WINDOW_GROUPS(3, 0), TURBO_WINDOW_GROUPS(3, 1) },
    { TURBO_WINDOW_GROUPS(4, 0), TURBO_WINDOW_GROUPS(4, 1) },
};

// [k - 2][odd], the same for every group
static const uint16_t turbo_window_factors[3][2][8] = {
    { TURBO_WINDOW_FACTORS(2, 0), TURBO_WINDOW_FACTORS(2, 1) },
    { TURBO_WINDOW_FACTORS(3, 0), TURBO_WINDOW_FACTORS(3, 1) },
    { TURBO_WINDOW_FACTORS(4, 0), TURBO_WINDOW_FACTORS(4, 1) },
};
