#version 450
#extension GL_EXT_shader_16bit_storage : require

// Blocks to floats: 16 threads a block, four values each.

#include "turbo-block.glsl"
#include "turbo-rows.glsl"

layout(local_size_x = 256) in;

layout(binding = 0) readonly  buffer BLOCKS { uint16_t data[]; } blocks;
layout(binding = 1) writeonly buffer FLOATS { float data[]; } floats;

shared uint codebook[64];

void main() {
    const uint thread = gl_LocalInvocationID.x;
    if (thread < 64u) {
        codebook[thread] = turbo_codebook_word(K, thread);
    }
    barrier();
    uint first_float, first_word;
    if (!locate(workgroup()*16u + thread/16u, first_float, first_word)) {
        return;
    }
    const uint i = 4u*(thread % 16u), word = turbo_first_word(K, i);
    const uint next = uint(blocks.data[first_word + min(word + 1u, turbo_words(K) - 1u)]);
    const uint bits = (uint(blocks.data[first_word + word]) | next << 16) >> turbo_first_bit(K, i);
    const float scale = turbo_scale(K, uint(blocks.data[first_word]) & ((1u << (8u + K)) - 1u));
    for (uint j = 0u; j < 4u; ++j) {
        const uint state = (bits >> (K*j)) & 255u;
        const int  entry = bitfieldExtract(int(codebook[state >> 2]), 8*int(state & 3u), 8);
        floats.data[first_float + i + j] = scale*float(entry);
    }
}
