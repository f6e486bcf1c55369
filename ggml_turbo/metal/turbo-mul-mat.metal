// MUL_MAT with weights of our types: a threadgroup has a tile of 32 rows of weights and 32 columns of the other factor,
// and goes through 64 channels at a time, as turbo-attention.metal does with keys and queries.
kernel void turbo_mul_mat(
        constant turbo_mul_mat_args & a       [[buffer(0)]],
        device const char           * weights [[buffer(1)]],
        device const char           * columns [[buffer(2)]],
        device       char           * product [[buffer(3)]],
        uint3  group         [[threadgroup_position_in_grid]],
        ushort thread_number [[thread_index_in_threadgroup]],
        ushort simd          [[simdgroup_index_in_threadgroup]]) {
    threadgroup half  codebook[TURBO_STATES];
    threadgroup float weight_tile[TURBO_KEYS*64];
    threadgroup float column_tile[TURBO_COLUMNS*64];
    const uint first_row = group.x*TURBO_KEYS, first_column = group.y*TURBO_COLUMNS;
    const uint i2 = group.z % a.n_slices, i3 = group.z/a.n_slices;
    const uint n_rows = min(a.n_rows - first_row, (uint) TURBO_KEYS);
    weights += first_row*a.weight_1 + i2/a.repeats_2*a.weight_2 + i3/a.repeats_3*a.weight_3;
    columns += i2*a.column_2 + i3*a.column_3;
    product += i2*a.product_2 + i3*a.product_3;

    turbo_copy_codebook(constant_bits, codebook, thread_number, 128);
    const uint is_there = n_rows == 32 ? ~0u : (1u << n_rows) - 1;
    simdgroup_float8x8 sum[TURBO_COLUMNS/8]; // of a simdgroup: eight rows
    TURBO_UNROLL for (short m = 0; m < TURBO_COLUMNS/8; ++m) {
        sum[m] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
    for (uint d = 0; d < a.n_values; d += 64) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        turbo_load_tile(constant_bits, weights, a.weight_1, d, is_there, codebook, weight_tile, thread_number);
        for (uint i = thread_number; i < TURBO_COLUMNS*64; i += 128) {
            const uint column = first_column + i/64;
            device const float * x = (device const float *) (columns + column*a.column_1);
            column_tile[i] = column < a.n_columns ? x[d + i % 64] : 0.0f;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (short i = 0; i < 8; ++i) {
            simdgroup_float8x8 of_rows, of_columns;
            simdgroup_load(of_rows, weight_tile + 8*simd*64 + 8*i, 64, 0, true);
            TURBO_UNROLL for (short m = 0; m < TURBO_COLUMNS/8; ++m) {
                simdgroup_load(of_columns, column_tile + 8*m*64 + 8*i, 64);
                simdgroup_multiply_accumulate(sum[m], of_columns, of_rows, sum[m]);
            }
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    TURBO_UNROLL for (short m = 0; m < TURBO_COLUMNS/8; ++m) {
        simdgroup_store(sum[m], column_tile + 8*m*TURBO_KEYS + 8*simd, TURBO_KEYS);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = thread_number; i < TURBO_COLUMNS*TURBO_KEYS; i += 128) {
        const uint column = first_column + i/TURBO_KEYS, row = i % TURBO_KEYS;
        if (column < a.n_columns && row < n_rows) {
            ((device float *) (product + column*a.product_1))[first_row + row] = column_tile[i];
        }
    }
}
