// Attention over keys and values of any of our types, in parts that turbo_combine puts together.
//
// A threadgroup has 8*M rows, queries of one head of keys: so what it decodes serves all query heads of the group. Its
// four simdgroups go through tiles of 32 keys. Of a tile they decode 64 channels at a time, as many as a block has, to
// threadgroup memory, and multiply: first queries with keys, a simdgroup eight keys; then weights with values, a
// simdgroup 16 channels. All of it is float32. A tile of which no query sees a key is skipped.

// What a query head multiplies the mask with: ALiBi (arXiv 2108.12409); 1 without.
static inline float turbo_slope(float max_bias, uint head, uint n_heads) {
    if (max_bias <= 0.0f) {
        return 1.0f;
    }
    const uint  power = 1u << (31 - clz(n_heads));
    const float base  = max_bias/(float) power;
    return head < power ? exp2(-base*(float) (head + 1)) : exp2(-0.5f*base*(float) (2*(head - power) + 1));
}

// f of what 16 neighbouring lanes have, in all of them.
static inline float turbo_largest_of_16(float x) {
    for (ushort distance = 8; distance > 0; distance /= 2) {
        x = max(x, simd_shuffle_xor(x, distance));
    }
    return x;
}
static inline float turbo_sum_of_16(float x) {
    for (ushort distance = 8; distance > 0; distance /= 2) {
        x += simd_shuffle_xor(x, distance);
    }
    return x;
}

static inline bool turbo_is_hidden(ushort mask) { // -infinity
    return mask == 0xfc00;
}

// CHUNKS: of 64 channels of a value.
template <short M, short CHUNKS>
kernel void turbo_attention(
        constant turbo_attention_args & a       [[buffer(0)]],
        device const char             * q       [[buffer(1)]],
        device const char             * k       [[buffer(2)]],
        device const char             * v       [[buffer(3)]],
        device const char             * mask    [[buffer(4)]],
        device const char             * window  [[buffer(5)]],
        device const char             * columns [[buffer(6)]],
        device       float            * parts   [[buffer(7)]],
        threadgroup turbo_attention_memory<M> * memory [[threadgroup(0)]],
        uint3  group         [[threadgroup_position_in_grid]],
        ushort thread_number [[thread_index_in_threadgroup]],
        ushort lane          [[thread_index_in_simdgroup]],
        ushort simd          [[simdgroup_index_in_threadgroup]]) {
    threadgroup half  * codebook_k = (threadgroup half *) memory->codebook_k;
    threadgroup half  * codebook_v = (threadgroup half *) memory->codebook_v;
    threadgroup float * tile = memory->tile, * weights = memory->rows, * factors = memory->factors;

    const uint kv_head = group.y, split = group.z % a.n_splits, stream = group.z/a.n_splits;
    const uint first_row = group.x*8*M, n_rows = a.n_queries*a.group, size_k = constant_size_k;
    q += stream*a.q_stream;
    k += kv_head*a.k_head + stream*a.k_stream;
    v += kv_head*a.v_head + stream*a.v_stream;
    columns += stream*a.columns_stream;
    device const int * tiles = (device const int *) columns + a.first_tile;

    turbo_copy_codebook(constant_type, codebook_k, thread_number, 128);
    turbo_copy_codebook(constant_type_v, codebook_v, thread_number, 128);
    for (uint i = thread_number; i < M*64; i += 128) {
        factors[i] = 0.0f;
    }

    // Of scores, a thread has the keys key and key + 16, and the rows row + 8*m.
    const uint key = thread_number % 16, row = thread_number/16;
    device const char * mask_row[M];
    device const char * window_row[M];
    ulong of_query[M]; // where its query is; of no row, another's, for what comes of it is nowhere used
    bool  is_row[M];
    float slope[M], largest[M], total[M];
    TURBO_UNROLL for (short m = 0; m < M; ++m) {
        const uint r = first_row + row + 8*m;
        is_row[m] = r < n_rows;
        const uint of_part = is_row[m] ? r/a.group : 0, query = a.first_query + of_part;
        const uint head = kv_head*a.group + (is_row[m] ? r % a.group : 0);
        of_query[m]   = query*a.q_query + head*a.q_head;
        mask_row[m]   = mask + query*a.mask_query + head % a.mask_heads*a.mask_head
                      + stream % a.mask_streams*a.mask_stream;
        window_row[m] = window + query*a.window_query + stream*a.window_stream;
        slope[m]      = turbo_slope(a.max_bias, head, a.n_heads);
        largest[m]    = TURBO_HIDDEN;
        total[m]      = 0.0f;
    }
    simdgroup_float8x8 result[M][2*CHUNKS];
    TURBO_UNROLL for (short m = 0; m < M; ++m) {
        TURBO_UNROLL for (short c = 0; c < 2*CHUNKS; ++c) {
            result[m][c] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        }
    }

    const uint begin = split*a.split_keys, end = min(begin + a.split_keys, a.n_keys);
    for (uint first = begin, parity = 0; first < end; first += TURBO_KEYS, parity ^= 1) {
        // What is seen of the tile
        float bias[M][2];
        uint  seen = 0;
        TURBO_UNROLL for (short m = 0; m < M; ++m) {
            TURBO_UNROLL for (short j = 0; j < 2; ++j) {
                const uint token = first + key + 16*j;
                bool is_seen = is_row[m] && token < end;
                bias[m][j] = 0.0f;
                if (is_seen && (constant_flags & TURBO_HAS_MASK)) {
                    const ushort masked = ((device const ushort *) mask_row[m])[token];
                    is_seen    = !turbo_is_hidden(masked);
                    bias[m][j] = (float) as_type<half>(masked);
                }
                if (is_seen && (constant_flags & TURBO_HAS_CACHE)) {
                    const int column = ((device const int *) columns)[token];
                    is_seen = column < 0 || turbo_is_hidden(((device const ushort *) window_row[m])[column]);
                }
                if (is_seen) {
                    seen |= 1u << (key + 16*j);
                } else {
                    bias[m][j] = TURBO_HIDDEN;
                }
            }
        }
        seen = simd_or(seen);
        if (lane == 0) {
            memory->seen_by[parity][simd] = seen;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        threadgroup const uint * by = memory->seen_by[parity];
        seen = by[0] | by[1] | by[2] | by[3];
        if (seen == 0) {
            continue;
        }

        // Scores
        simdgroup_float8x8 score[M];
        TURBO_UNROLL for (short m = 0; m < M; ++m) {
            score[m] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        }
        for (uint d = 0; d < size_k; d += 64) {
            turbo_load_tile(constant_type, k + first*a.k_key, a.k_key, d, seen, codebook_k, tile, thread_number);
            turbo_multiply_rows<M>(q, of_query, d, tile, memory->rows, score, thread_number, simd);
        }
        TURBO_UNROLL for (short m = 0; m < M; ++m) {
            simdgroup_store(score[m], weights + 8*m*TURBO_KEYS + 8*simd, TURBO_KEYS);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);

        // Weights
        TURBO_UNROLL for (short m = 0; m < M; ++m) {
            threadgroup float * of_row = weights + (row + 8*m)*TURBO_KEYS + key;
            float x[2];
            TURBO_UNROLL for (short j = 0; j < 2; ++j) {
                x[j] = TURBO_HIDDEN;
                if (bias[m][j] > TURBO_HIDDEN) {
                    float product = of_row[16*j];
                    if (constant_flags & TURBO_HAS_TILES) {
                        device const float * biases = (device const float *) (q + of_query[m]) + size_k;
                        product += biases[tiles[first + key + 16*j]];
                    }
                    x[j] = product*a.scale;
                    x[j] = a.softcap != 0.0f ? a.softcap*precise::tanh(x[j]/a.softcap) : x[j];
                    x[j] += slope[m]*bias[m][j];
                }
            }
            const float top    = turbo_largest_of_16(max(largest[m], max(x[0], x[1])));
            const float factor = largest[m] > TURBO_HIDDEN ? exp(largest[m] - top) : 0.0f;
            float sum = 0.0f;
            TURBO_UNROLL for (short j = 0; j < 2; ++j) {
                const float weight = x[j] > TURBO_HIDDEN ? exp(x[j] - top) : 0.0f;
                of_row[16*j] = weight;
                sum += weight;
            }
            total[m]   = total[m]*factor + turbo_sum_of_16(sum);
            largest[m] = top;
            if (key == 0) {
                factors[m*64 + 9*row] = factor;
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);

        // Values
        TURBO_UNROLL for (short m = 0; m < M; ++m) {
            simdgroup_float8x8 factor;
            simdgroup_load(factor, factors + m*64, 8);
            TURBO_UNROLL for (short c = 0; c < 2*CHUNKS; ++c) {
                simdgroup_multiply(result[m][c], factor, result[m][c]);
            }
        }
        TURBO_UNROLL for (short c = 0; c < CHUNKS; ++c) {
            turbo_load_tile(constant_type_v, v + first*a.v_key, a.v_key, 64*c, seen, codebook_v, tile, thread_number);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            for (short i = 0; i < TURBO_KEYS/8; ++i) {
                simdgroup_float8x8 of_values[2], weight;
                simdgroup_load(of_values[0], tile + 8*i*64 + 16*simd, 64);
                simdgroup_load(of_values[1], tile + 8*i*64 + 16*simd + 8, 64);
                TURBO_UNROLL for (short m = 0; m < M; ++m) {
                    simdgroup_load(weight, weights + 8*m*TURBO_KEYS + 8*i, TURBO_KEYS);
                    simdgroup_multiply_accumulate(result[m][2*c], weight, of_values[0], result[m][2*c]);
                    simdgroup_multiply_accumulate(result[m][2*c + 1], weight, of_values[1], result[m][2*c + 1]);
                }
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
        }
    }

    // Of each row: its result so far, its largest score, and its sum of weights
    const uint size = 64*CHUNKS + 2, n_kv_heads = a.n_heads/a.group;
    const ulong of_head = ((ulong) (a.first_part + split)*a.n_streams + stream)*n_kv_heads + kv_head;
    device float * part = parts + (of_head*a.padded_rows + first_row)*size;
    TURBO_UNROLL for (short m = 0; m < M; ++m) {
        TURBO_UNROLL for (short c = 0; c < CHUNKS; ++c) {
            simdgroup_store(result[m][2*c],     part + 8*m*size + 64*c + 16*simd,     size);
            simdgroup_store(result[m][2*c + 1], part + 8*m*size + 64*c + 16*simd + 8, size);
        }
        if (key == 0) {
            part[(row + 8*m)*size + 64*CHUNKS]     = largest[m];
            part[(row + 8*m)*size + 64*CHUNKS + 1] = total[m];
        }
    }
}

typedef decltype(turbo_attention<1, 1>) turbo_attention_t;

// The most rows whose results the registers of a simdgroup hold: 8*M.
template [[host_name("turbo_attention_m1_c1")]] kernel turbo_attention_t turbo_attention<1, 1>;
template [[host_name("turbo_attention_m1_c2")]] kernel turbo_attention_t turbo_attention<1, 2>;
template [[host_name("turbo_attention_m1_c3")]] kernel turbo_attention_t turbo_attention<1, 3>;
template [[host_name("turbo_attention_m1_c4")]] kernel turbo_attention_t turbo_attention<1, 4>;
template [[host_name("turbo_attention_m1_c5")]] kernel turbo_attention_t turbo_attention<1, 5>;
template [[host_name("turbo_attention_m1_c8")]] kernel turbo_attention_t turbo_attention<1, 8>;
template [[host_name("turbo_attention_m1_c9")]] kernel turbo_attention_t turbo_attention<1, 9>;
template [[host_name("turbo_attention_m4_c1")]] kernel turbo_attention_t turbo_attention<4, 1>;
template [[host_name("turbo_attention_m4_c2")]] kernel turbo_attention_t turbo_attention<4, 2>;
template [[host_name("turbo_attention_m4_c3")]] kernel turbo_attention_t turbo_attention<4, 3>;
template [[host_name("turbo_attention_m4_c4")]] kernel turbo_attention_t turbo_attention<4, 4>;
template [[host_name("turbo_attention_m2_c5")]] kernel turbo_attention_t turbo_attention<2, 5>;
template [[host_name("turbo_attention_m2_c8")]] kernel turbo_attention_t turbo_attention<2, 8>;
template [[host_name("turbo_attention_m2_c9")]] kernel turbo_attention_t turbo_attention<2, 9>;

// The result of attention from its parts: a threadgroup a row.
kernel void turbo_combine(
        constant turbo_combine_args & a      [[buffer(0)]],
        device const float          * parts  [[buffer(1)]],
        device const float          * sinks  [[buffer(2)]],
        device       float          * result [[buffer(3)]],
        uint3  group         [[threadgroup_position_in_grid]],
        ushort thread_number [[thread_index_in_threadgroup]]) {
    const uint  head = group.x, query = group.y, stream = group.z, n_heads = a.group*a.n_kv_heads, size = a.size_v + 2;
    const uint  row  = query*a.group + head % a.group;
    const ulong step = (ulong) a.n_streams*a.n_kv_heads*a.padded_rows*size;
    device const float * part = parts + (((ulong) stream*a.n_kv_heads + head/a.group)*a.padded_rows + row)*size;
    const float sink = a.has_sinks ? sinks[head] : TURBO_HIDDEN; // one more key, without a value
    float largest = sink;
    for (uint i = 0; i < a.n_parts; ++i) {
        largest = max(largest, part[i*step + a.size_v]);
    }
    float total = sink > TURBO_HIDDEN ? exp(sink - largest) : 0.0f;
    for (uint i = 0; i < a.n_parts; ++i) {
        const float top = part[i*step + a.size_v];
        total += top > TURBO_HIDDEN ? exp(top - largest)*part[i*step + a.size_v + 1] : 0.0f;
    }
    device float * to = result + (((ulong) stream*a.all_queries + a.first_query + query)*n_heads + head)*a.size_v;
    for (uint d = thread_number; d < a.size_v; d += 64) {
        float sum = 0.0f;
        for (uint i = 0; i < a.n_parts; ++i) {
            const float top = part[i*step + a.size_v];
            sum += top > TURBO_HIDDEN ? exp(top - largest)*part[i*step + d] : 0.0f;
        }
        to[d] = total > 0.0f ? sum/total : 0.0f;
    }
}
