#pragma once

// How 16-byte shuffles gather the states of a block, for instruction sets without per-lane bit shifts of bytes.
//
// 16 values have their states in 2k+1 bytes. A 16-byte load at TURBO_STATE_LOAD holds them for one group of
// 16 values; two shuffles bring the two bytes around each state into a 16-bit lane, for the 8 even and the 8 odd
// values of the group; a multiplication shifts the state into the lane's high byte.

#include "ggml-turbo.h"

#define TURBO_STATE_LAST(K)       (TURBO_BLOCK_BYTES(K) - 16) // loads end with the block at the latest
#define TURBO_STATE_LOAD(K, g)    (1 + 2*(K)*(g) < TURBO_STATE_LAST(K) ? 1 + 2*(K)*(g) : TURBO_STATE_LAST(K))

#define TURBO_STATE_BYTE(K, g, i) (TURBO_STATE_BIT(K, 16*(g) + (i))/8 - TURBO_STATE_LOAD(K, g))
#define TURBO_STATE_NEXT(b)       ((b) < 15 ? (b) + 1 : 0x80) // past the block: that state is one whole byte
#define TURBO_STATE_PAIR(K, g, i) TURBO_STATE_BYTE(K, g, i), TURBO_STATE_NEXT(TURBO_STATE_BYTE(K, g, i))
#define TURBO_STATE_GROUP(K, g, odd) {                                                                  \
    TURBO_STATE_PAIR(K, g,  0 + odd), TURBO_STATE_PAIR(K, g,  2 + odd), TURBO_STATE_PAIR(K, g,  4 + odd), \
    TURBO_STATE_PAIR(K, g,  6 + odd), TURBO_STATE_PAIR(K, g,  8 + odd), TURBO_STATE_PAIR(K, g, 10 + odd), \
    TURBO_STATE_PAIR(K, g, 12 + odd), TURBO_STATE_PAIR(K, g, 14 + odd) }
#define TURBO_STATE_GROUPS(K, odd) {                                         \
    TURBO_STATE_GROUP(K, 0, odd), TURBO_STATE_GROUP(K, 1, odd), \
    TURBO_STATE_GROUP(K, 2, odd), TURBO_STATE_GROUP(K, 3, odd) }

#define TURBO_STATE_FACTOR(K, i)    (1 << (8 - TURBO_STATE_BIT(K, i) % 8))
#define TURBO_STATE_FACTORS(K, odd) {                                                                      \
    TURBO_STATE_FACTOR(K, 0 + odd), TURBO_STATE_FACTOR(K,  2 + odd), TURBO_STATE_FACTOR(K,  4 + odd), \
    TURBO_STATE_FACTOR(K, 6 + odd), TURBO_STATE_FACTOR(K,  8 + odd), TURBO_STATE_FACTOR(K, 10 + odd), \
    TURBO_STATE_FACTOR(K, 12 + odd), TURBO_STATE_FACTOR(K, 14 + odd) }

#define TURBO_STATE_ASSERT(K, ID)                                                                                     \
    TURBO_ASSERT(TURBO_BLOCK_BYTES(K) >= 16, "a 16-byte load fits in a block");                                       \
    TURBO_ASSERT(2*(K) + 1 <= 16, "16 states fit in a 16-byte load");                                                 \
    TURBO_ASSERT(TURBO_STATE_BYTE(K, 3, 15) == 15 && TURBO_STATE_BIT(K, 63) % 8 == 0, "the last byte is one state");   \
    TURBO_ASSERT(16*(K) % 8 == 0, "every group of 16 begins at the same bit of a byte: one row of factors serves all");
TURBO_TYPES(TURBO_STATE_ASSERT)
#undef TURBO_STATE_ASSERT

#define TURBO_STATE_GROUPS_OF(K, ID)  { TURBO_STATE_GROUPS(K, 0), TURBO_STATE_GROUPS(K, 1) },
#define TURBO_STATE_FACTORS_OF(K, ID) { TURBO_STATE_FACTORS(K, 0), TURBO_STATE_FACTORS(K, 1) },

// [k - TURBO_FEWEST_BITS][odd][group]
static const uint8_t turbo_state_bytes[][2][4][16] = { TURBO_TYPES(TURBO_STATE_GROUPS_OF) };

// [k - TURBO_FEWEST_BITS][odd], the same for every group
static const uint16_t turbo_state_factors[][2][8] = { TURBO_TYPES(TURBO_STATE_FACTORS_OF) };
