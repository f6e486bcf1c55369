// Rows of floats and rows of blocks: GET_ROWS, and CPY from blocks. SET_ROWS and CPY to them are turbo-encode.metal's.

// Where unit i of a slice, group.y and group.z, lies; false if there are fewer.
static inline bool turbo_locate(constant turbo_rows_args & a, uint i, uint3 group, device const char * index,
                                thread uint & unit, thread ulong & first, thread ulong & second) {
    const uint i1 = i/a.n_units;
    if (i1 >= a.n1) {
        return false;
    }
    unit = i % a.n_units;
    ulong row = i1; // the indexed one: of what SET_ROWS writes, of what GET_ROWS reads; both are blocks
    if (constant_index != 0) {
        device const char * at = index + i1*a.index_1 + group.y % a.index_n2*a.index_2 + group.z % a.index_n3*a.index_3;
        row = constant_index == 8 ? *(device const ulong *) at : (ulong) *(device const uint *) at;
    }
    first  = i1*a.first_1 + group.y*a.first_2 + group.z*a.first_3;
    second = row*a.second_1 + group.y*a.second_2 + group.z*a.second_3;
    return true;
}

// Blocks to floats: 16 threads a block, four values each.
kernel void turbo_decode(
        constant turbo_rows_args & a      [[buffer(0)]],
        device       char        * floats [[buffer(1)]],
        device const char        * blocks [[buffer(2)]],
        device const char        * index  [[buffer(3)]],
        threadgroup turbo_decode_memory * memory [[threadgroup(0)]],
        uint3  group         [[threadgroup_position_in_grid]],
        ushort thread_number [[thread_index_in_threadgroup]]) {
    threadgroup half * codebook = (threadgroup half *) memory->codebook;
    turbo_copy_codebook(constant_bits, codebook, thread_number, 16*TURBO_DECODED_AT_ONCE);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint  unit;
    ulong of_floats, of_blocks;
    const uint block = group.x*TURBO_DECODED_AT_ONCE + thread_number/16;
    if (!turbo_locate(a, block, group, index, unit, of_floats, of_blocks)) {
        return;
    }
    const uint i = 4*(thread_number % 16), at = unit*QK_TURBO + i;
    const float4 values = turbo_row_values(constant_bits, blocks + of_blocks, at, codebook);
    for (uint j = 0; j < 4; ++j) {
        if (constant_type == TURBO_VALUES_F16) {
            ((device half *) (floats + of_floats))[at + j] = (half) values[j];
        } else {
            ((device float *) (floats + of_floats))[at + j] = values[j];
        }
    }
}

// Blocks to blocks of the same type: a thread a word.
kernel void turbo_copy(
        constant turbo_rows_args & a    [[buffer(0)]],
        device const char        * from [[buffer(1)]],
        device       char        * to   [[buffer(2)]],
        uint3  group         [[threadgroup_position_in_grid]],
        ushort thread_number [[thread_index_in_threadgroup]]) {
    uint  unit;
    ulong first, second;
    const uint word = group.x*16*TURBO_DECODED_AT_ONCE + thread_number;
    if (turbo_locate(a, word, group, from, unit, first, second)) {
        ((device ushort *) (to + second))[unit] = ((device const ushort *) (from + first))[unit];
    }
}
