// Floats to blocks: a block of 64 values by two simdgroups, one for each candidate of the scale; the same bytes as
// format/turbo-reference.c, of which format/README.md has the steps.
//
// llama.cpp compiles kernels with fast math, which fuses and reorders what it sees. So sums and products whose
// roundings matter are separated by turbo_rounded, and what is no sum and no product of floats is done in integers.

// The same value; the compiler cannot know, and merges no operation before it with one behind it.
static inline float turbo_rounded(float x, ushort lane) {
    return simd_shuffle(x, lane);
}

static inline float turbo_power_of_two(int exponent) {
    return as_type<float>((uint) (exponent + 127) << 23);
}

static inline ulong turbo_square(uint x) {
    return (ulong) x*x;
}

// The square root, rounded to nearest. What is below 2^-100 makes a scale of zero anyway.
static inline float turbo_exact_sqrt(float a) {
    const uint bits = as_type<uint>(a);
    if (bits < 27u << 23) {
        return 0.0f;
    }
    const int   exponent = (int) (bits >> 23) - 127, up = exponent % 2 == 0 ? 23 : 24;
    const uint  mantissa = (bits & 0x7fffff) | 0x800000;
    const ulong square   = (ulong) mantissa << up;
    uint root = (uint) sqrt((float) mantissa*turbo_power_of_two(up)); // nearly
    while (turbo_square(root) > square) {
        --root;
    }
    while (turbo_square(root + 1) <= square) {
        ++root;
    }
    root += (uint) (square > turbo_square(root) + root); // above the square of root + 1/2
    return (float) root*turbo_power_of_two((exponent - 23 - up)/2);
}

// 256/scale, rounded to nearest even.
static inline float turbo_units(int k, int code) {
    const uint one      = 1u << TURBO_SCALE_MANTISSA(k), mantissa = one | ((uint) code & (one - 1));
    const int  exponent = (code >> TURBO_SCALE_MANTISSA(k)) - TURBO_SCALE_BIAS;
    const int  up       = TURBO_SCALE_MANTISSA(k) + (mantissa == one ? 23 : 24);
    const uint quotient = (1u << up)/mantissa, rest = (1u << up) % mantissa;
    const uint rounded  = quotient + (uint) (2*rest > mantissa || (2*rest == mantissa && quotient % 2 == 1));
    return (float) rounded*turbo_power_of_two(8 - exponent + TURBO_SCALE_MANTISSA(k) - up);
}

// Whether a code above this one has the scale that entries with the squared norm cc need for this energy.
static inline bool turbo_is_above(int k, int code, float energy, int cc, ushort lane) {
    const float end = as_type<float>(turbo_scale_end(k, code)), square = turbo_rounded(end*end, lane);
    return energy >= turbo_rounded(square*(float) cc, lane);
}

// The code of the scale that keeps the norm. The comparisons decide; what is before them comes within one code.
static inline int turbo_fit_scale(int k, int code, float energy, int cc, ushort lane) {
    const int  last = TURBO_SCALE_CODES(k) - 1;
    const int  fitted = turbo_scale_from_float(k, as_type<uint>(sqrt(energy/(float) max(cc, 1))));
    const bool below = turbo_is_above(k, max(fitted - 1, 0), energy, cc, lane);
    const bool above = turbo_is_above(k, fitted, energy, cc, lane);
    return cc == 0 ? code : fitted > 0 && !below ? fitted - 1 : fitted + (int) (fitted < last && above);
}

kernel void turbo_encode(
        constant turbo_rows_args & a      [[buffer(0)]],
        device const char        * floats [[buffer(1)]],
        device       char        * blocks [[buffer(2)]],
        device const char        * index  [[buffer(3)]],
        threadgroup turbo_encode_memory * memory [[threadgroup(0)]],
        uint3  group     [[threadgroup_position_in_grid]],
        ushort lane      [[thread_index_in_simdgroup]],
        ushort candidate [[simdgroup_index_in_threadgroup]]) {
    const int k = constant_bits, n_shared = TURBO_SHARED(k), codes = TURBO_CODES(k);
    const int per_lane = TURBO_STATES/32;

    uint  unit;
    ulong of_floats, of_blocks;
    if (!turbo_locate(a, group.x, group, index, unit, of_floats, of_blocks)) {
        return;
    }
    device const char * x   = floats + of_floats + (ulong) unit*QK_TURBO*(constant_type == TURBO_VALUES_F16 ? 2 : 4);
    device uchar      * out = (device uchar *) blocks + of_blocks + (ulong) unit*TURBO_BLOCK_BYTES(k);
    for (int s = lane + 32*candidate; s < TURBO_STATES; s += 64) {
        memory->codebook[s] = turbo_codebook(k)[s];
    }

    // Without NaN, infinities and what overflows. Both halves of the simdgroup have all 64 values.
    uint bits[4];
    int  largest = 0;
    TURBO_UNROLL for (int j = 0; j < 4; ++j) {
        const int i = lane % 16 + 16*j;
        bits[j] = constant_type == TURBO_VALUES_F16 ? as_type<uint>((float) ((device const half *) x)[i])
                                                    : ((device const uint *) x)[i];
        largest = turbo_largest(largest, bits[j]);
    }
    largest = min(simd_max(largest), TURBO_MAX_INPUT);

    // The sum of squares, in the order of format/README.md: four terms a lane of 16, then halves onto halves.
    float value[4], energy = 0.0f;
    TURBO_UNROLL for (int j = 0; j < 4; ++j) {
        value[j] = as_type<float>(turbo_sanitize(bits[j], largest));
        const float square = turbo_rounded(value[j]*value[j], lane);
        energy = turbo_rounded(energy + square, lane);
    }
    for (ushort half_of = 8; half_of > 0; half_of /= 2) {
        energy = turbo_rounded(energy + simd_shuffle_xor(energy, half_of), lane);
    }

    const float rms_to_scale = k == 2 ? turbo2_rms_to_scale : k == 3 ? turbo3_rms_to_scale : turbo4_rms_to_scale;
    const float max_to_scale = k == 2 ? turbo2_max_to_scale : k == 3 ? turbo3_max_to_scale : turbo4_max_to_scale;
    const float by_rms = turbo_rounded(turbo_exact_sqrt(energy/QK_TURBO)*rms_to_scale, lane);
    const float by_max = turbo_rounded(as_type<float>((uint) largest)*max_to_scale, lane);
    const float guess  = max(by_rms, by_max);
    const int   low    = turbo_scale_from_float(k, as_type<uint>(turbo_rounded(guess*0.94f, lane)));
    const int   high   = turbo_scale_from_float(k, as_type<uint>(turbo_rounded(guess*1.06f, lane)));
    if (low == 0) { // the other candidate is not smaller
        for (int i = lane + 32*candidate; i < TURBO_BLOCK_BYTES(k); i += 64) {
            out[i] = 0;
        }
        return;
    }
    const int   code  = candidate == 0 ? low : high;
    const float units = turbo_units(k, code);
    if (lane < 16) {
        TURBO_UNROLL for (int j = 0; j < 4; ++j) {
            memory->target[candidate][lane + 16*j] = (ushort) ((int) rint(turbo_limit_target(value[j]*units)) + 32768);
        }
    }
    for (int u = lane; u < n_shared; u += 32) {
        memory->costs[candidate][0][u] = 0; // every start is free
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // This lane has the states 8*lane + j. They lead to `outs` values of the bits that the next state shares, each from
    // `each` of them; or, if fewer than all that lead to one are here, to a part of one.
    const int each = min(codes, per_lane), outs = per_lane/each, lanes = codes/each, before = per_lane*lane % n_shared;
    int entry[8];
    TURBO_UNROLL for (int j = 0; j < per_lane; ++j) {
        entry[j] = memory->codebook[per_lane*lane + j];
    }
    uint total = 0;
    for (int i = 0; i < QK_TURBO; ++i) {
        const int t = (int) memory->target[candidate][i] - 32768;
        threadgroup const uint * from = memory->costs[candidate][i % 2];
        uint next[2] = { ~0u, ~0u }; // cost and, below it, the code: of equal costs the smaller state
        TURBO_UNROLL for (int j = 0; j < per_lane; ++j) {
            const uint cost = (uint) turbo_path_cost((int) from[before + j], t, entry[j]);
            next[j/each] = min(next[j/each], cost << 4 | (uint) ((per_lane*lane + j) % codes));
        }
        if (lanes == 2) {
            next[0] = min(next[0], simd_shuffle_xor(next[0], (ushort) 1));
        }
        if ((i + 1) % TURBO_RENORMALIZE == 0) {
            const uint least = simd_min(outs == 2 ? min(next[0], next[1]) : next[0]) >> 4;
            total += least;
            next[0] -= least << 4;
            next[1] -= least << 4;
        }
        if (lane % lanes == 0) {
            TURBO_UNROLL for (int o = 0; o < 2; ++o) {
                const int u = lane/lanes*outs + o;
                if (o < outs) {
                    memory->costs[candidate][(i + 1) % 2][u] = next[o] >> 4;
                    memory->decisions[candidate][i][u] = next[o] & 15;
                }
            }
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
    }

    const float scale  = as_type<float>(turbo_scale_to_float(k, code));
    const float square = turbo_rounded(scale*scale, lane);
    const float error  = turbo_rounded((float) total*square, lane);
    if (lane == 0) {
        memory->errors[candidate] = error;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (candidate != (memory->errors[1] < memory->errors[0] ? 1 : 0)) {
        return;
    }

    // The states of the best path; ties go to the smaller state.
    uint best = ~0u;
    for (int u = lane; u < n_shared; u += 32) {
        best = min(best, memory->costs[candidate][QK_TURBO % 2][u] << 8 | (uint) u);
    }
    uint shared_bits = simd_min(best) & 255;
    if (lane == 0) {
        for (int i = QK_TURBO - 1; i >= 0; --i) {
            const uint state = shared_bits*codes + memory->decisions[candidate][i][shared_bits];
            memory->states[i]   = state;
            shared_bits = state % n_shared;
        }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    int cc = 0;
    for (int i = lane; i < QK_TURBO; i += 32) {
        const int e = memory->codebook[memory->states[i]];
        cc += e*e;
    }
    const int header = turbo_header(k, turbo_fit_scale(k, code, energy, simd_sum(cc), lane), memory->states[0]);
    if (lane < QK_TURBO/8) { // eight codes, k bytes
        uint packed_codes = 0;
        for (int j = 0; j < 8; ++j) {
            packed_codes |= (uint) turbo_state_code(k, memory->states[8*lane + j]) << k*j;
        }
        for (int j = 0; j < k; ++j) {
            out[TURBO_HEADER_BITS/8 + k*lane + j] = packed_codes >> 8*j & 255;
        }
    } else if (lane == QK_TURBO/8) {
        out[0] = header & 255;
        out[1] = header >> 8;
    }
}
