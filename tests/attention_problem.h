#pragma once

// Problems of attention as test_attention.py writes them, as nodes of ggml. The few functions of ggml that kernels call
// for them are here; types are those that need no more of ggml.

#include "ggml-turbo.h"
#include "ops/turbo-window.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

static float half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t) (h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
    uint32_t u = sign | (exponent + 112) << 23 | mantissa << 13;
    if (exponent == 31) {
        u = sign | 0x7f800000 | mantissa << 13;
    } else if (exponent == 0) {
        const float magnitude = mantissa/16777216.0f;
        return sign ? -magnitude : magnitude;
    }
    float f;
    memcpy(&f, &u, sizeof(f));
    return f;
}

static void f16_to_float(const void * x, float * y, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        y[i] = half_to_float(((const uint16_t *) x)[i]);
    }
}

template <int BITS>
static void turbo_to_float(const void * x, float * y, int64_t n) {
    for (int64_t i = 0; i < n/QK_TURBO; ++i) {
        turbo_dequantize_block(turbo_get_codec(BITS), (const uint8_t *) x + i*TURBO_BLOCK_BYTES(BITS), y + i*QK_TURBO);
    }
}

const ggml_type_traits * ggml_get_type_traits(ggml_type type) {
    static const ggml_type_traits f32 = { "f32", 1, 0, sizeof(float), false, nullptr, nullptr };
    static const ggml_type_traits f16 = { "f16", 1, 0, sizeof(uint16_t), false, f16_to_float, nullptr };
#define TRAITS(K, ID)                                                                                                  \
    static const ggml_type_traits turbo##K = { "turbo" #K, QK_TURBO,          0,      TURBO_BLOCK_BYTES(K),            \
                                               true,       turbo_to_float<K>, nullptr };
    TURBO_TYPES(TRAITS)
    static const ggml_type_traits bf16 = { "bf16", 1, 0, sizeof(uint16_t), false, nullptr, nullptr };
    static const ggml_type_traits q8_0 = { "q8_0", 32, 0, 34, true, nullptr, nullptr };
    static const ggml_type_traits q4_0 = { "q4_0", 32, 0, 18, true, nullptr, nullptr };
    static const ggml_type_traits i32 = { "i32", 1, 0, sizeof(int32_t), false, nullptr, nullptr };
    switch (type) {
        case GGML_TYPE_F32:    return &f32;
        case GGML_TYPE_I32:    return &i32;
        case GGML_TYPE_BF16:   return &bf16;
        case GGML_TYPE_Q8_0:   return &q8_0;
        case GGML_TYPE_Q4_0:   return &q4_0;
        case GGML_TYPE_F16:    return &f16;
#define CASE(K, ID) case GGML_TYPE_TURBO##K: return &turbo##K;
        TURBO_TYPES(CASE)
        default:               abort();
    }
}

int64_t ggml_blck_size  (ggml_type type) { return ggml_get_type_traits(type)->blck_size; }
size_t  ggml_type_size  (ggml_type type) { return ggml_get_type_traits(type)->type_size; }
bool    ggml_is_quantized(ggml_type type) { return ggml_get_type_traits(type)->is_quantized; }

float ggml_fp16_to_fp32(ggml_fp16_t x) { return half_to_float(x); }

// of the one tensor that is made, that of the results
static ggml_tensor * made;
ggml_tensor * ggml_new_tensor_4d(ggml_context *, ggml_type, int64_t, int64_t, int64_t, int64_t) { return made; }

static bool read(void * to, size_t size) {
    return fread(to, 1, size, stdin) == size;
}

struct tensor : ggml_tensor {
    std::vector<char> memory;

    // dimensions from the innermost in memory; `order` of them as the operator sees them
    tensor(ggml_type t, const int (&in_memory)[4], const int (&order)[4]) : ggml_tensor() {
        type = t;
        size_t stride = ggml_type_size(t);
        for (int i = 0; i < 4; ++i) {
            ne[order[i]] = in_memory[i];
            nb[order[i]] = stride;
            stride *= i == 0 ? in_memory[0]/ggml_blck_size(t) : in_memory[i];
        }
        memory.resize(stride);
        data = memory.data();
    }

    void fill() {
        if (!memory.empty() && !read(data, memory.size())) {
            abort();
        }
    }
};

// A node, FLASH_ATTN_EXT or attention with a recent window, with its sources and its result.
struct problem {
    struct numbers {
        int32_t sequences, heads, queries, size_k, keys, kv_heads, size_v, type_k, type_v, mask_heads, mask_sequences,
            sinks;
        int32_t slots, tokens; // of a recent window; 0: there is none
        int32_t tiles;         // of keys, for which queries have numbers
        float scale, max_bias, softcap;
    };

    tensor q, k, v, mask, sinks, ring, new_k, new_v, mask_w, columns, out;

    explicit problem(const numbers & p)
        : q(GGML_TYPE_F32, { p.size_k + p.tiles, p.queries, p.heads, p.sequences }, plain),
          k((ggml_type) p.type_k, { p.size_k, p.kv_heads, p.keys, p.sequences }, cache),
          v((ggml_type) p.type_v, { p.size_v, p.kv_heads, p.keys, p.sequences }, cache),
          mask(GGML_TYPE_F16, { p.keys, p.queries, p.mask_heads, p.mask_sequences }, plain),
          sinks(GGML_TYPE_F32, { p.heads, 1, 1, 1 }, plain),
          ring(GGML_TYPE_F16, { p.kv_heads*(p.size_k + p.size_v), p.slots, 1, p.sequences }, plain),
          new_k(GGML_TYPE_F32, { p.size_k, p.kv_heads, p.tokens, p.sequences }, cache),
          new_v(GGML_TYPE_F32, { p.size_v, p.kv_heads, p.tokens, p.sequences }, cache),
          mask_w(GGML_TYPE_F16, { p.slots + p.tokens, p.queries, 1, p.sequences }, plain),
          columns(GGML_TYPE_I32,
                  { (p.slots ? p.keys : 0) + (p.tiles ? p.keys + p.slots + p.tokens : 0), 1, 1, p.sequences }, plain),
          out(GGML_TYPE_F32, { p.size_v, p.heads, p.queries, p.sequences }, plain) {
        for (tensor * t : { &q, &k, &v, &mask }) {
            t->fill();
        }
        if (p.sinks) {
            sinks.fill();
        }
        for (tensor * t : { &ring, &new_k, &new_v, &mask_w, &columns }) {
            t->fill();
        }
        ggml_tensor * sources[TURBO_WINDOW_SOURCES] = {
            &q,     &k,      &v,       p.mask_heads ? &mask : nullptr, p.sinks ? &sinks : nullptr, &ring, &new_k,
            &new_v, &mask_w, &columns,
        };
        if (p.slots) {
            made = &out;
            turbo_window_attention(nullptr, sources, p.scale, p.max_bias, p.softcap);
        } else {
            out.op = GGML_OP_FLASH_ATTN_EXT;
            std::copy_n(sources, TURBO_WINDOW_SINKS + 1, out.src);
            memcpy((float *) out.op_params + 0, &p.scale,    sizeof(float));
            memcpy((float *) out.op_params + 1, &p.max_bias, sizeof(float));
            memcpy((float *) out.op_params + 2, &p.softcap,  sizeof(float));
        }
    }

  private:
    static constexpr int plain[4] = { 0, 1, 2, 3 }, cache[4] = { 0, 2, 1, 3 };
};
