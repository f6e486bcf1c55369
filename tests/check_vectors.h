#pragma once

// Whether an encoder and a decoder give what format/vectors.bin holds: for a back end's own test. It needs the C library
// and turbo-block.h, nothing else; format/README.md has the file's layout, and what an encoder may do otherwise.

#include "turbo-block.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// n blocks of type k, 64 values each, in memory of the CPU.
typedef void (*turbo_vectors_encode_t)(int k, int n, const float * x, uint8_t * blocks);
typedef void (*turbo_vectors_decode_t)(int k, int n, const uint8_t * blocks, float * y);

// Where two runs of n pieces of `size` bytes differ first; -1 if they do not.
static inline int turbo_vectors_differ(const void * a, const void * b, int n, size_t size) {
    for (int i = 0; i < n; ++i) {
        if (memcmp((const char *) a + i*size, (const char *) b + i*size, size) != 0) {
            return i;
        }
    }
    return -1;
}

// Says on stderr what differs, and returns the number of differences; 0 is right. -1: the file cannot be read. encode:
// NULL for a back end that only decodes.
static inline int turbo_check_vectors(const char * path, turbo_vectors_encode_t encode, turbo_vectors_decode_t decode) {
    FILE * file = fopen(path, "rb");
    if (!file) {
        fprintf(stderr, "%s cannot be opened\n", path);
        return -1;
    }
    static const char cut[] = "%s is not a file of version 1, or is cut short\n";
    char     magic[8];
    uint32_t head[4]; // version, types, n, m
    int      wrong = 0;
    if (fread(magic, 8, 1, file) != 1 || memcmp(magic, "TURBOVEC", 8) != 0 || fread(head, sizeof(head), 1, file) != 1 || head[0] != 1) {
        fprintf(stderr, cut, path);
        fclose(file);
        return -1;
    }
    const int n = (int) head[2], m = (int) head[3], most = n > m ? n : m;
    const size_t values = QK_TURBO*sizeof(float);
    float   * x      = (float *)   malloc(n*values);
    float   * y      = (float *)   malloc(most*values);
    float   * out    = (float *)   malloc(most*values);
    uint8_t * blocks = (uint8_t *) malloc((size_t) most*TURBO_BLOCK_BYTES(7));
    uint8_t * coded  = (uint8_t *) malloc((size_t) most*TURBO_BLOCK_BYTES(7));
    if (fread(x, values, n, file) != (size_t) n) {
        wrong = -1;
    }
    for (uint32_t type = 0; type < head[1] && wrong >= 0; ++type) {
        uint32_t which[2]; // k, the number in ggml
        if (fread(which, sizeof(which), 1, file) != 1) {
            wrong = -1;
            break;
        }
        const int    k    = (int) which[0];
        const size_t size = TURBO_BLOCK_BYTES(k);
        for (int arbitrary = 0; arbitrary < 2; ++arbitrary) { // blocks of the reference, then arbitrary ones
            const int count = arbitrary ? m : n;
            if (fread(blocks, size, count, file) != (size_t) count || fread(y, values, count, file) != (size_t) count) {
                wrong = -1;
                break;
            }
            if (!arbitrary && encode) {
                encode(k, count, x, coded);
                const int at = turbo_vectors_differ(coded, blocks, count, size);
                if (at >= 0) {
                    fprintf(stderr, "turbo%d: encoding differs, first in block %d\n", k, at);
                    ++wrong;
                }
            }
            decode(k, count, blocks, out);
            const int at = turbo_vectors_differ(out, y, count, values);
            if (at >= 0) {
                fprintf(stderr, "turbo%d: decoding of %s differs, first in block %d\n", k, arbitrary ? "arbitrary bytes" : "the reference's blocks", at);
                ++wrong;
            }
        }
    }
    if (wrong < 0) {
        fprintf(stderr, cut, path);
    }
    free(x); free(y); free(out); free(blocks); free(coded);
    fclose(file);
    return wrong;
}
