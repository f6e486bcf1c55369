#version 450
#extension GL_EXT_shader_16bit_storage : require

// Floats to blocks: a workgroup a block, a thread a trellis state. The steps and their order are those of
// format/README.md. Vulkan does not promise exact square roots and divisions, so these are made of integers here; sums
// and products of floats it rounds correctly, to nearest on every device known. So the bytes are the reference's.

#include "turbo-block.glsl"
#include "turbo-rows.glsl"

layout(local_size_x = 256) in;

layout(constant_id = 2) const uint FROM_HALVES = 0; // 1: values are float16, else float32

// As bits: no driver may change a NaN.
layout(binding = 0) readonly  buffer FLOATS { uint data[]; } floats;
layout(binding = 0) readonly  buffer HALVES { uint16_t data[]; } halves;
layout(binding = 1) writeonly buffer BLOCKS { uint16_t data[]; } blocks;

const uint SHARED = 1u << (8u - K), CODES = 1u << K; // turbo-block.h

shared uint  largest;
shared float x[64], sums[16];
shared float energy, guess;
shared int   target[2][64];
shared uint  cost[2][256];     // of paths that end in a state, by candidate
shared uint  best[2][SHARED];  // of paths that can go on to states with these low bits
shared uint  smallest[2], total[2];
shared uint  decisions[2][64*8]; // by value and low bits: the code of the best state, 4 bits each
shared uint  states[64];
shared int   cc;

// ---- exact arithmetic ----

float power_of_two(int exponent) {
    return uintBitsToFloat(uint(exponent + 127) << 23);
}

bool is_above(uint root, uvec2 square) { // root^2 > square; (low, high)
    uint high, low;
    umulExtended(root, root, high, low);
    return high > square.y || (high == square.y && low > square.x);
}

// The square root, rounded to nearest. What is below 2^-100 makes a scale of zero anyway.
float exact_sqrt(float a) {
    const uint bits = floatBitsToUint(a);
    if (bits < 27u << 23) {
        return 0.0;
    }
    const int  exponent = int(bits >> 23) - 127, up = (exponent & 1) == 0 ? 23 : 24;
    const uint mantissa = (bits & 0x7fffffu) | 0x800000u;
    const uvec2 square  = uvec2(mantissa << up, mantissa >> (32 - up));
    uint root = uint(sqrt(float(mantissa)*power_of_two(up)));
    while (is_above(root, square)) {
        --root;
    }
    while (!is_above(root + 1u, square)) {
        ++root;
    }
    uint high, low; // above root^2 + root: above the square of root + 1/2
    umulExtended(root, root + 1u, high, low);
    root += uint(square.y > high || (square.y == high && square.x > low));
    return float(root)*power_of_two((exponent - 23 - up)/2);
}

// 256/scale, rounded to nearest even.
float units_of(uint code) {
    const uint one      = 1u << (K + 2u), mantissa = one | (code & (one - 1u));
    const int  exponent = int(code >> (K + 2u)) - 40;
    const int  up       = int(K) + 2 + (mantissa == one ? 23 : 24);
    const uint quotient = (1u << up)/mantissa, rest = (1u << up) % mantissa;
    const uint rounded  = quotient + uint(2u*rest > mantissa || (2u*rest == mantissa && (quotient & 1u) == 1u));
    return float(rounded)*power_of_two(8 - exponent + int(K) + 2 - up);
}

// ---- the steps ----

uint path_cost(uint before, int wanted, int entry) {
    const int d = clamp(wanted - 256*entry, -32768, 32767);
    return min(before + uint((d*d + (1 << 14)) >> 15), 65535u);
}

// The bits of a float32. Of integers, since a device may take subnormal halves for zeros.
uint load_bits(uint i) {
    if (FROM_HALVES == 0) {
        return floats.data[i];
    }
    const uint bits = uint(halves.data[i]), sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
    return sign | (magnitude >= 0x7c00u ? 0x7f800000u | (magnitude << 13)
                 : magnitude >= 0x0400u ? (magnitude << 13) + (112u << 23)
                                        : floatBitsToUint(float(magnitude)*power_of_two(-24)));
}

// Needs every thread: x, energy and guess.
void measure(uint s, uint first_float) {
    const uint bits = load_bits(first_float + s % 64u);
    if (s == 0u) {
        largest = 0u;
        cc      = 0;
    }
    barrier();
    if (s < 64u && (bits & 0x7fffffffu) < 0x7f800000u) {
        atomicMax(largest, bits & 0x7fffffffu);
    }
    barrier();
    const uint most = min(largest, 0x4e000000u);
    if (s < 64u) {
        const uint magnitude = bits & 0x7fffffffu;
        x[s] = uintBitsToFloat(magnitude > 0x7f800000u ? 0u : (bits & 0x80000000u) | min(magnitude, most));
    }
    barrier();
    if (s < 16u) {
        float sum = 0.0;
        for (uint i = s; i < 64u; i += 16u) {
            precise const float square = x[i]*x[i];
            precise const float with_it = sum + square;
            sum = with_it;
        }
        sums[s] = sum;
    }
    barrier();
    if (s == 0u) {
        for (uint n = 8u; n > 0u; n /= 2u) {
            for (uint lane = 0u; lane < n; ++lane) {
                precise const float sum = sums[lane] + sums[lane + n];
                sums[lane] = sum;
            }
        }
        energy = sums[0];
        const float rms_to_scale = K == 2u ? turbo2_rms_to_scale : K == 3u ? turbo3_rms_to_scale : turbo4_rms_to_scale;
        const float max_to_scale = K == 2u ? turbo2_max_to_scale : K == 3u ? turbo3_max_to_scale : turbo4_max_to_scale;
        precise const float by_rms = exact_sqrt(energy/64.0)*rms_to_scale;
        precise const float by_max = uintBitsToFloat(most)*max_to_scale;
        guess = max(by_rms, by_max);
    }
    barrier();
}

// Needs every thread: decisions and total of both candidates, and the costs of the last states.
void search(uint s, int entry) {
    for (uint i = s; i < 64u*8u; i += 256u) {
        decisions[0][i] = 0u;
        decisions[1][i] = 0u;
    }
    const uint c = s/SHARED, u = s % SHARED; // the first 2*SHARED threads have a candidate and low bits
    if (c < 2u) {
        best[c][u] = 0u;
    }
    if (s < 2u) {
        total[s] = 0u;
    }
    barrier();
    for (uint i = 0u; i < 64u; ++i) {
        const uint before = s & (SHARED - 1u);
        cost[0][s] = path_cost(best[0][before], target[0][i], entry);
        cost[1][s] = path_cost(best[1][before], target[1][i], entry);
        barrier();
        if (c < 2u) {
            uint least = 65536u, code = 0u;
            for (uint j = 0u; j < CODES; ++j) {
                const uint of_state = cost[c][u*CODES + j];
                if (of_state < least) {
                    least = of_state;
                    code  = j;
                }
            }
            best[c][u] = least;
            atomicOr(decisions[c][i*8u + u/8u], code << (4u*(u % 8u)));
        }
        barrier();
        if ((i + 1u) % 16u == 0u) {
            if (s < 2u) {
                uint least = 65535u;
                for (uint j = 0u; j < SHARED; ++j) {
                    least = min(least, best[s][j]);
                }
                smallest[s] = least;
                total[s] += least;
            }
            barrier();
            if (c < 2u && i < 63u) { // the last ones are compared below
                best[c][u] -= smallest[c];
            }
            barrier();
        }
    }
}

// By one thread: the states of the best path.
void trace_back(uint c) {
    uint low = 0u; // bits of the state that follows
    for (uint j = 1u; j < SHARED; ++j) {
        low = best[c][j] < best[c][low] ? j : low;
    }
    for (int i = 63; i >= 0; --i) {
        states[i] = low*CODES + ((decisions[c][uint(i)*8u + low/8u] >> (4u*(low % 8u))) & 15u);
        low = states[i] & (SHARED - 1u);
    }
}

bool is_scale_above(uint code) {
    const float end = turbo_scale_end(K, code);
    precise const float square = end*end;
    precise const float limit  = square*float(cc);
    return energy >= limit;
}

// The code of the scale that keeps the norm.
uint fit_scale(uint code) {
    if (cc == 0) {
        return code;
    }
    const uint last = (1u << (8u + K)) - 1u, fitted = turbo_scale_code(K, sqrt(energy/float(cc)));
    if (fitted > 0u && !is_scale_above(fitted - 1u)) {
        return fitted - 1u;
    }
    return fitted + uint(fitted < last && is_scale_above(fitted));
}

void main() {
    const uint s = gl_LocalInvocationID.x;
    uint first_float, first_word;
    if (!locate(workgroup(), first_float, first_word)) {
        return;
    }
    measure(s, first_float);
    precise const float below = guess*0.94, above = guess*1.06;
    const uint code[2] = uint[](turbo_scale_code(K, below), turbo_scale_code(K, above));
    if (code[0] == 0u || code[1] == 0u) {
        if (s < turbo_words(K)) {
            blocks.data[first_word + s] = uint16_t(0);
        }
        return;
    }
    if (s < 128u) {
        precise const float t = x[s % 64u]*units_of(code[s/64u]);
        target[s/64u][s % 64u] = int(roundEven(clamp(t, -32767.0, 32767.0)));
    }
    barrier();
    search(s, turbo_entry(K, s));
    const float scales[2] = float[](turbo_scale(K, code[0]), turbo_scale(K, code[1]));
    precise const float square_0 = scales[0]*scales[0], square_1 = scales[1]*scales[1];
    precise const float error_0 = float(total[0])*square_0, error_1 = float(total[1])*square_1;
    const uint c = error_1 < error_0 ? 1u : 0u;
    if (s == 0u) {
        trace_back(c);
    }
    barrier();
    if (s < 64u) {
        const int entry = turbo_entry(K, states[s]);
        atomicAdd(cc, entry*entry);
    }
    barrier();
    if (s == 0u) {
        blocks.data[first_word] = uint16_t(fit_scale(code[c]) | (states[0] & (SHARED - 1u)) << (8u + K));
    }
    if (s < 4u*K) {
        uint word = 0u;
        for (uint i = 0u; i < 16u; ++i) {
            const uint bit = 16u*s + i;
            word |= ((states[bit/K] >> (8u - K + bit % K)) & 1u) << i;
        }
        blocks.data[first_word + 1u + s] = uint16_t(word);
    }
}
