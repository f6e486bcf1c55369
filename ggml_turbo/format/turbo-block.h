#pragma once

// The arithmetic of one block, in functions from values to values: README.md says what the fields mean.
//
// The same text is C, C++, CUDA, HIP and Metal: no library, no pointer, no struct, no memory. What differs between the
// languages stays with the caller:
//   - a float's bits come and go as uint32_t (C: memcpy; CUDA, HIP: __float_as_uint; Metal: as_type; GLSL, which has to
//     write the functions out: floatBitsToUint). So what is done to NaN and infinities are integer operations, which no
//     fast-math option can drop;
//   - rounding to an integer, square root and division, which a caller must have rounded to nearest (README.md; those of
//     the stored scale need not be);
//   - TURBO_FUNCTION, what stands before a function, may be defined before this file is included.
//
// k is 2, 3 or 4, the bits of a code: a constant wherever it matters.

#if !defined(__METAL_VERSION__)
#  include <stdint.h>
#endif

#if !defined(TURBO_FUNCTION)
#  if defined(__CUDACC__) || defined(__HIPCC__)
#    define TURBO_FUNCTION static inline __host__ __device__
#  else
#    define TURBO_FUNCTION static inline
#  endif
#endif

#if defined(__cplusplus)
#  define TURBO_ASSERT(condition, message) static_assert(condition, message)
#else
#  define TURBO_ASSERT(condition, message) _Static_assert(condition, message)
#endif

#define QK_TURBO          64         // values in a block
#define TURBO_STATES      256        // trellis states, of 8 bits
#define TURBO_SCALE_BIAS  40
#define TURBO_HEADER_BITS 16         // scale and start
#define TURBO_MAX_ENTRY   127        // of a codebook, either sign
#define TURBO_MAX_TARGET  32767      // 128 codebook units, with 8 fractional bits
#define TURBO_MAX_INPUT   0x4e000000 // bits of 2^29: a whole block of it is within reach of the largest scale
#define TURBO_INFINITY    0x7f800000 // bits of an infinity; a NaN's are above
#define TURBO_RENORMALIZE 16         // costs are 16 bits wide: after this many values the smallest is taken off all

#define TURBO_BLOCK_BYTES(k) (TURBO_HEADER_BITS/8 + (k)*QK_TURBO/8)

#define TURBO_SCALE_BITS(k) (8 + (k))       // of the header, from bit 0 on
#define TURBO_START_BITS(k) (8 - (k))       // of the header, above them
#define TURBO_CODES(k)      (1 << (k))      // what can follow or precede a state
#define TURBO_SHARED(k)     (1 << (8 - (k))) // values of the bits that a state and the one before it share

// ---- scale: 6 bits of exponent, k+2 of mantissa; code 0 is zero ----

#define TURBO_SCALE_MANTISSA(k) ((k) + 2)
#define TURBO_SCALE_CODES(k)    (1 << TURBO_SCALE_BITS(k))

// The bits of the scale that a code stands for. The code is the top of a float's exponent and mantissa, with another
// bias.
TURBO_FUNCTION uint32_t turbo_scale_to_float(int k, int code) {
    const uint32_t bits = (uint32_t) code << (23 - TURBO_SCALE_MANTISSA(k));
    return code == 0 ? 0 : bits + ((uint32_t) (127 - TURBO_SCALE_BIAS) << 23);
}

// The nearest code to the scale with these bits, which is not negative; saturates at both ends.
TURBO_FUNCTION int turbo_scale_from_float(int k, uint32_t bits) {
    const int code = (int) ((bits + (1u << (22 - TURBO_SCALE_MANTISSA(k)))) >> (23 - TURBO_SCALE_MANTISSA(k)))
                   - ((127 - TURBO_SCALE_BIAS) << TURBO_SCALE_MANTISSA(k));
    return code < 0 ? 0 : code < TURBO_SCALE_CODES(k) ? code : TURBO_SCALE_CODES(k) - 1;
}

// The bits of the scale halfway to the next code, the least of those that turbo_scale_from_float takes to it.
TURBO_FUNCTION uint32_t turbo_scale_end(int k, int code) {
    return ((uint32_t) code << (23 - TURBO_SCALE_MANTISSA(k))) + (1u << (22 - TURBO_SCALE_MANTISSA(k)))
         + ((uint32_t) (127 - TURBO_SCALE_BIAS) << 23);
}

// ---- header and states ----

// Two bytes, the first the lower one.
TURBO_FUNCTION int turbo_header(int k, int scale_code, int first_state) {
    return scale_code | (first_state & (TURBO_SHARED(k) - 1)) << TURBO_SCALE_BITS(k);
}

TURBO_FUNCTION int turbo_header_scale(int k, int header) {
    return header & (TURBO_SCALE_CODES(k) - 1);
}

// Where in a block the state of value i begins; least significant bit first.
#define TURBO_STATE_BIT(k, i) (TURBO_HEADER_BITS - 8 + (k)*((i) + 1))

// The state of value i, from a word whose lowest byte is byte TURBO_STATE_BIT(k, i)/8 of the block; of the last value
// that byte is the state, and there may be none above it.
TURBO_FUNCTION int turbo_state(int k, int i, uint32_t word) {
    return (int) (word >> TURBO_STATE_BIT(k, i) % 8) & (TURBO_STATES - 1);
}

// The code that a value adds, the top of its state.
TURBO_FUNCTION int turbo_state_code(int k, int state) {
    return state >> (8 - k);
}

// State s follows the states turbo_first_before(k, s) + t, t < 2^k.
TURBO_FUNCTION int turbo_first_before(int k, int state) {
    return (state << k) & (TURBO_STATES - 1);
}

// ---- codebook ----

// codebook[s] = a[s & 15] + b[turbo_b_index(s, p[s & 15])]
TURBO_FUNCTION int turbo_b_index(int state, int p) {
    return (state >> 4) ^ p;
}

// A value; the product is exact but for the last rounding of a float.
TURBO_FUNCTION float turbo_value(float scale, int entry) {
    return scale*(float) entry;
}

// ---- encoder ----

// Bits of the larger of a magnitude found so far and that of x; NaN and infinities do not count. Magnitudes are compared
// as their bits, which order alike; the largest of a block is then limited to TURBO_MAX_INPUT.
TURBO_FUNCTION int turbo_largest(int largest, uint32_t x) {
    const int magnitude = (int) (x & 0x7fffffff);
    const int finite    = magnitude < TURBO_INFINITY ? magnitude : 0;
    return finite > largest ? finite : largest;
}

// Bits of x without NaN, which becomes 0, and with magnitudes up to `largest`.
TURBO_FUNCTION uint32_t turbo_sanitize(uint32_t x, int largest) {
    const int magnitude = (int) (x & 0x7fffffff);
    const int limited   = magnitude < largest ? magnitude : largest;
    return magnitude > TURBO_INFINITY ? 0 : (x & 0x80000000) | (uint32_t) limited;
}

// x*256/scale, within what a target can be; the caller rounds it to the nearest integer, ties to even.
TURBO_FUNCTION float turbo_limit_target(float t) {
    const float u = t > (float) TURBO_MAX_TARGET ? (float) TURBO_MAX_TARGET : t;
    return u < -(float) TURBO_MAX_TARGET ? -(float) TURBO_MAX_TARGET : u;
}

// Cost of a path that goes on with a codebook entry for a target, from the cost of the best path that can. The step
// costs twice the squared distance, in codebook units, rounded; the distance saturates at 128 units, the cost at 65535.
TURBO_FUNCTION int turbo_path_cost(int best, int target, int entry) {
    const int distance = target - 256*entry;
    const int d    = distance > 32767 ? 32767 : distance < -32768 ? -32768 : distance;
    const int cost = best + ((d*d + (1 << 14)) >> 15);
    return cost > 65535 ? 65535 : cost;
}

// ---- what all of this relies on ----

#define TURBO_ASSERT_BITS(k)                                                                                          \
    TURBO_ASSERT(TURBO_SCALE_BITS(k) + TURBO_START_BITS(k) == TURBO_HEADER_BITS, "scale and start fill the header");  \
    TURBO_ASSERT((k)*QK_TURBO % 16 == 0, "a block is a whole number of 16-bit words: 2-byte loads stay aligned");     \
    TURBO_ASSERT(TURBO_STATE_BIT(k, QK_TURBO - 1) + 8 == 8*TURBO_BLOCK_BYTES(k), "the last state ends the block");   \
    TURBO_ASSERT(TURBO_STATE_BIT(k, QK_TURBO - 1) % 8 == 0, "and is one whole byte: no read goes past the block");    \
    TURBO_ASSERT(TURBO_SCALE_MANTISSA(k) <= 10, "the square of a scale halfway between two is exact as a float")

TURBO_ASSERT(QK_TURBO % 8 == 0, "codes are packed eight at a time, k bytes");
TURBO_ASSERT(QK_TURBO % TURBO_RENORMALIZE == 0, "the last step renormalizes, so that the total is the whole cost");
TURBO_ASSERT(63 - TURBO_SCALE_BIAS + 127 < 255, "the largest scale is finite");
TURBO_ASSERT(32768*32768 <= 0x7fffffff - (1 << 14), "a squared distance, rounded, fits in 31 bits");
TURBO_ASSERT(QK_TURBO/TURBO_RENORMALIZE*65535 <= 1 << 24, "the cost of a block is exact as a float");
TURBO_ASSERT(QK_TURBO*TURBO_MAX_ENTRY*TURBO_MAX_ENTRY <= 1 << 24, "a sum of entry^2 is exact as a float");
