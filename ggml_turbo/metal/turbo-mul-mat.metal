// MUL_MAT and MUL_MAT_ID with weights of our types: a threadgroup has a tile of 32 rows of weights and 32 columns of
// the other factor, and goes through 64 channels at a time, as turbo-attention.metal does with keys and queries.
//
// Of MUL_MAT_ID, where each token names experts, slices of the weights, a first kernel lists the columns of each
// expert; so an expert's weights are decoded once for 32 of its columns.

TURBO_ASSERT(TURBO_CHANNELS(TURBO_COLUMNS/8) <= TURBO_KEYS, "columns at hand take no more memory than their products");

// For each expert, by a simdgroup: how many columns it has, and which; token*a.n_used + i is the i-th of a token.
kernel void turbo_list_columns(
        constant turbo_mul_mat_args & a     [[buffer(0)]],
        device const char           * ids   [[buffer(1)]],
        device       uint           * lists [[buffer(2)]],
        uint3  group [[threadgroup_position_in_grid]],
        ushort lane  [[thread_index_in_simdgroup]]) {
    device uint * list = lists + group.x*(1 + a.n_ids);
    uint count = 0;
    for (uint first = 0; first < a.n_ids; first += 32) {
        const uint i = first + lane;
        uint is_here = 0;
        if (i < a.n_ids) {
            device const char * id = ids + i % a.n_used*a.id_1 + i/a.n_used*a.id_2;
            is_here = *(device const uint *) id == group.x;
        }
        const uint at = 1 + count + simd_prefix_exclusive_sum(is_here);
        if (is_here) {
            list[at] = i;
        }
        count += simd_sum(is_here);
    }
    if (lane == 0) {
        list[0] = count;
    }
}

// Where column c of a threadgroup's is in the first and the second dimension of columns.
static inline uint2 turbo_column(constant turbo_mul_mat_args & a, device const uint * list, uint c, uint i2) {
    return constant_flags & TURBO_HAS_EXPERTS ? uint2(list[1 + c] % a.n_used, list[1 + c]/a.n_used) : uint2(c, i2);
}

kernel void turbo_mul_mat(
        constant turbo_mul_mat_args & a       [[buffer(0)]],
        device const char           * weights [[buffer(1)]],
        device const char           * columns [[buffer(2)]],
        device       char           * product [[buffer(3)]],
        device const uint           * lists   [[buffer(4)]],
        threadgroup turbo_mul_mat_memory * memory [[threadgroup(0)]],
        uint3  group         [[threadgroup_position_in_grid]],
        ushort thread_number [[thread_index_in_threadgroup]],
        ushort simd          [[simdgroup_index_in_threadgroup]]) {
    threadgroup half * codebook = (threadgroup half *) memory->codebook;
    const uint first_row = group.x*TURBO_KEYS, n_rows = min(a.n_rows - first_row, (uint) TURBO_KEYS);
    const uint i2 = group.z % a.n_slices, i3 = group.z/a.n_slices; // of experts, i2 is which
    device const uint * list = lists + i2*(1 + a.n_ids);
    const uint n_columns = constant_flags & TURBO_HAS_EXPERTS ? list[0] : a.n_columns;
    weights += first_row*a.weight_1 + i2/a.repeats_2*a.weight_2 + i3/a.repeats_3*a.weight_3;
    columns += i3*a.column_3;
    product += i3*a.product_3;

    turbo_copy_codebook(constant_bits, codebook, thread_number, 128);
    const uint is_there = n_rows == 32 ? ~0u : (1u << n_rows) - 1;
    for (uint first = group.y*TURBO_COLUMNS; first < n_columns; first += a.columns_step) {
        ulong of_column[TURBO_COLUMNS/8]; // of none, another's
        simdgroup_float8x8 sum[TURBO_COLUMNS/8]; // of a simdgroup: eight rows
        TURBO_UNROLL for (short m = 0; m < TURBO_COLUMNS/8; ++m) {
            const uint  c  = first + thread_number/16 + 8*m;
            const uint2 at = turbo_column(a, list, c < n_columns ? c : first, i2);
            of_column[m] = at.x % a.distinct*a.column_1 + at.y*a.column_2;
            sum[m] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup); // the codebook is there, the product before this one stored
        for (uint d = 0; d < a.n_values; d += QK_TURBO) {
            turbo_load_tile(constant_bits, weights, a.weight_1, d, is_there, codebook, memory->tile, thread_number);
            turbo_multiply_rows<TURBO_COLUMNS/8>(
                columns, of_column, d, memory->tile, memory->rows, sum, thread_number, simd);
        }
        TURBO_UNROLL for (short m = 0; m < TURBO_COLUMNS/8; ++m) {
            simdgroup_store(sum[m], memory->rows + 8*m*TURBO_KEYS + 8*simd, TURBO_KEYS);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint i = thread_number; i < TURBO_COLUMNS*TURBO_KEYS; i += 128) {
            const uint c = first + i/TURBO_KEYS, row = i % TURBO_KEYS;
            if (c < n_columns && row < n_rows) {
                const uint2 at = turbo_column(a, list, c, i2);
                device float * to = (device float *) (product + at.x*a.product_1 + at.y*a.product_2);
                to[first_row + row] = memory->rows[i];
            }
        }
    }
}
