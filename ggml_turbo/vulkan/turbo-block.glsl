// The arithmetic of a turbo block (format/turbo-block.h, format/README.md) in GLSL. k is the bits of a code, 2, 3 or 4.

#include "format/tables/turbo-tables.glsl"

// Word i of the codebook, four entries. A shader copies the codebook to shared memory.
uint turbo_codebook_word(uint k, uint i) {
    return k == 2u ? turbo2_codebook[i] : k == 3u ? turbo3_codebook[i] : turbo4_codebook[i];
}

int turbo_entry(uint k, uint state) {
    return bitfieldExtract(int(turbo_codebook_word(k, state >> 2)), 8*int(state & 3u), 8);
}

// The scale that a code stands for.
float turbo_scale(uint k, uint code) {
    return code == 0u ? 0.0 : uintBitsToFloat((code << (21u - k)) + (87u << 23));
}

// The nearest code to a scale, which is not negative; saturates at both ends.
uint turbo_scale_code(uint k, float scale) {
    const int code = int((floatBitsToUint(scale) + (1u << (20u - k))) >> (21u - k)) - int(87u << (k + 2u));
    return uint(clamp(code, 0, int(1u << (8u + k)) - 1));
}

// Halfway between the scales of a code and of the next.
float turbo_scale_end(uint k, uint code) {
    return uintBitsToFloat((code << (21u - k)) + (1u << (20u - k)) + (87u << 23));
}

// 16-bit words of a block: the header, then the codes. Those of four values from value i on, a multiple of four, lie in
// the words from turbo_first_word on, as bits from turbo_first_bit on: the second word may be the one after the block's
// last, and then has no bit of them.
const uint TURBO_VALUES = 64u;

uint turbo_words(uint k) {
    return 1u + 4u*k;
}

uint turbo_first_word(uint k, uint i) {
    return (8u + k*(i + 1u))/16u;
}

uint turbo_first_bit(uint k, uint i) {
    return (8u + k*(i + 1u)) % 16u;
}
