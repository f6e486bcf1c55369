// Rows of blocks and rows of floats, from one to the other: SET_ROWS and GET_ROWS with an index for each row, CPY
// without.

layout(constant_id = 0) const uint K           = 4; // bits of a code
layout(constant_id = 1) const uint INDEX_WORDS = 0; // of 32 bits, of a row's index; 0: there are no indices

layout(push_constant) uniform parameters {
    uint n_blocks;       // of a row
    uint n1, n2, n3;     // rows of floats, in three dimensions
    uint index_n2, index_n3; // indices repeat in the second and the third
    uint float_offset, float_1, float_2, float_3; // floats
    uint word_offset, word_1, word_2, word_3;     // 16-bit words of blocks
    uint index_offset, index_1, index_2, index_3; // 32-bit words
} p;

layout(binding = 2) readonly buffer INDICES { uint data[]; } indices;

// Where block i lies among all; false if there are fewer. first_float: of its values, first_word: of its bytes.
bool locate(uint i, out uint first_float, out uint first_word) {
    const uint block = i % p.n_blocks, i1 = i/p.n_blocks % p.n1;
    const uint i2 = i/p.n_blocks/p.n1 % p.n2, i3 = i/p.n_blocks/p.n1/p.n2;
    if (i3 >= p.n3) {
        return false;
    }
    const uint row = INDEX_WORDS == 0 ? i1
        : indices.data[p.index_offset + i1*p.index_1 + i2 % p.index_n2*p.index_2 + i3 % p.index_n3*p.index_3];
    first_float = p.float_offset + block*TURBO_VALUES  + i1*p.float_1 + i2*p.float_2 + i3*p.float_3;
    first_word  = p.word_offset  + block*turbo_words(K) + row*p.word_1 + i2*p.word_2 + i3*p.word_3;
    return true;
}

// A grid of workgroups has fewer columns than there may be blocks.
uint workgroup() {
    return gl_WorkGroupID.y*gl_NumWorkGroups.x + gl_WorkGroupID.x;
}
