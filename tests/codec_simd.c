// Compares the SIMD codec this file is compiled with to the scalar reference; test_codec.py builds it once for each
// instruction set. Prints the instruction set; exit code 0: all equal.

#include "cpu/turbo-cpu.h"
#include "format/turbo-encode.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BLOCKS 480
#define N      (BLOCKS*QK_TURBO)

static uint64_t random_state = 20261121;

static uint32_t random_bits(void) { // splitmix64
    uint64_t z = (random_state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30))*0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27))*0x94d049bb133111ebu;
    return (uint32_t) ((z ^ (z >> 31)) >> 32);
}

static float gaussian(void) {
    float sum = 0.0f;
    for (int i = 0; i < 12; ++i) {
        sum += (float) (random_bits() >> 8)/(1 << 24);
    }
    return sum - 6.0f;
}

// Block b of the input: every third Gaussian, the rest what a model should never produce.
static void fill(int b, float * x) {
    for (int i = 0; i < QK_TURBO; ++i) {
        const float    g = gaussian();
        const uint32_t any = random_bits();
        switch (b % 15) {
            case  0: memcpy(&x[i], &any, sizeof(any)); break; // any bit pattern
            case  1: x[i] = 0.0f; break;
            case  2: x[i] = 3.5f; break;
            case  3: x[i] = i == 17 ? 1e30f : g; break;
            case  4: x[i] = 1e-40f*g; break; // denormal
            case  5: x[i] = i == 5 ? INFINITY : i == 6 ? NAN : g; break;
            case  6: x[i] = i % 2 ? -INFINITY : INFINITY; break;
            case  7: x[i] = i == 9 ? -7.0f : 0.0f; break; // a single spike
            case  8: x[i] = i % 2 ? 1.0f : -1.0f; break;
            case  9: x[i] = ldexpf(g, -40); break; // around the smallest scale
            case 10: x[i] = i < 16 ? 5.0f : 0.0f; break;
            case 11: x[i] = g*expf(4.0f*gaussian()); break; // heavy tails
            default: x[i] = g*expf((float) (b % 40) - 20.0f); break;
        }
    }
}

static int failures = 0;

static void expect(int ok, const char * what, int bits, int block) {
    if (!ok && failures++ < 10) {
        fprintf(stderr, "turbo%d, block %d: %s\n", bits, block, what);
    }
}

typedef void (*quantize_t)(const float *, void *, int64_t);
typedef void (*dequantize_t)(const void *, float *, int64_t);
typedef void (*dot_t)(int, float *, size_t, const void *, size_t, const void *, size_t, int);

static void check(int bits, quantize_t quantize, dequantize_t dequantize, dot_t dot) {
    static float   x[N], y[N], y_simd[N];
    static uint8_t q8[N/32][34];

    const turbo_codec * codec = turbo_get_codec(bits);
    const int           size  = TURBO_BLOCK_BYTES(bits);
    // blocks end where an unreadable page could begin: sanitizers see a read past the last one
    uint8_t * blocks = malloc((size_t) BLOCKS*size), * blocks_simd = malloc((size_t) BLOCKS*size);

    for (int b = 0; b < BLOCKS; ++b) {
        fill(b, x + b*QK_TURBO);
        turbo_quantize_block(codec, x + b*QK_TURBO, blocks + b*size);
    }
    quantize(x, blocks_simd, N);
    for (int b = 0; b < BLOCKS; ++b) {
        expect(memcmp(blocks + b*size, blocks_simd + b*size, size) == 0, "encoded differently", bits, b);
    }

    for (int i = 0; i < BLOCKS*size/4; ++i) { // half of the blocks: any bytes
        blocks[i] = (uint8_t) random_bits();
    }
    for (int b = 0; b < BLOCKS; ++b) {
        turbo_dequantize_block(codec, blocks + b*size, y + b*QK_TURBO);
    }
    dequantize(blocks, y_simd, N);
    for (int b = 0; b < BLOCKS; ++b) {
        expect(memcmp(y + b*QK_TURBO, y_simd + b*QK_TURBO, QK_TURBO*sizeof(float)) == 0, "decoded differently", bits, b);
    }

    for (int i = 0; i < N/32; ++i) {
        const uint16_t d[4] = { 0x3c00, 0x2e66, 0xbc00, 0x0001 }; // 1, 0.1, -1, the smallest denormal
        memcpy(q8[i], &d[i % 4], 2);
        for (int j = 0; j < 32; ++j) {
            q8[i][2 + j] = (uint8_t) (random_bits() % 255 - 127);
        }
    }
    const double scale[4] = { 1.0, 0x1.998p-4, -1.0, 0x1p-24 };
    for (int n = QK_TURBO; n <= 576; n += QK_TURBO) {
        for (int b = 0; b + n/QK_TURBO <= BLOCKS; b += 7) {
            float s;
            dot(n, &s, 0, blocks + b*size, 0, q8[2*b], 0, 1);
            double sum = 0, magnitude = 0;
            for (int i = 0; i < n; ++i) {
                const int    row  = 2*b + i/32;
                const double term = (double) y[b*QK_TURBO + i]*scale[row % 4]*(int8_t) q8[row][2 + i % 32];
                sum += term;
                magnitude += fabs(term);
            }
            // each of at most 2*9 partial sums is rounded a few times, each time by 2^-24 of what it has summed so far
            expect(fabs(s - sum) <= 64*0x1p-24*magnitude, "dot product is off", bits, b);
        }
    }
    free(blocks);
    free(blocks_simd);
}

// The stored scale changes from one code to the next exactly where the format says, whatever the square root gives.
static void check_scales(int bits) {
    const turbo_codec * codec = turbo_get_codec(bits);
    const int           last  = TURBO_SCALE_CODES(bits) - 1;
    uint8_t states[QK_TURBO];
    for (int code = 0; code < last; ++code) {
        int cc = 0;
        for (int i = 0; i < QK_TURBO; ++i) {
            states[i] = (uint8_t) random_bits();
            cc += codec->codebook[states[i]]*codec->codebook[states[i]];
        }
        const float begin = turbo_scale_value(bits, code > 0 ? code : 1), next = turbo_scale_value(bits, code + 1);
        const float end   = code > 0 ? (begin + next)/2 : ldexpf(1.0f + ldexpf(1.0f, -(bits + 3)), -40);
        const float least = end*end*(float) cc; // of the next code
        expect(turbo_fit_scale(codec, least, states, 7) == code + 1, "a scale begins elsewhere", bits, code);
        expect(turbo_fit_scale(codec, nextafterf(least, 0), states, 7) == code, "a scale ends elsewhere", bits, code);
    }
    expect(turbo_fit_scale(codec, FLT_MAX, states, 7) == last, "the largest scale is not the last code", bits, last);
    expect(turbo_fit_scale(codec, 0, states, 7) == 0, "no energy is not code 0", bits, 0);
    turbo_codec zeros = *codec;
    memset(zeros.codebook, 0, sizeof(zeros.codebook));
    expect(turbo_fit_scale(&zeros, 1, states, 7) == 7, "entries of 0 have a scale", bits, 0);
}

int main(void) {
#define CHECK(K, ID) check(K, quantize_row_turbo##K, dequantize_row_turbo##K##_cpu, ggml_vec_dot_turbo##K##_q8_0);
    TURBO_TYPES(CHECK)
#define CHECK_SCALES(K, ID) check_scales(K);
    TURBO_TYPES(CHECK_SCALES)
    printf("%s\n", turbo_cpu_simd());
    return failures != 0;
}
