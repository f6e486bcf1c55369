#version 450
#extension GL_EXT_control_flow_attributes : enable
#extension GL_EXT_shader_16bit_storage : require
#extension GL_EXT_shader_explicit_arithmetic_types : require

// Attention of rows to a range of keys, for the two operators that read turbo types: FLASH_ATTN_EXT, and attention with
// a recent window (ops/turbo-window.h), whose cache, ring and batch are a dispatch each. A row is a query of one of the
// heads that share a KV head. What comes out is one part of the softmax; turbo-combine.comp makes the result of all
// parts.
//
// A workgroup has ROWS rows and takes KEYS keys at a time. Keys and values are decoded once for all rows, 64 channels
// at a time, into shared memory, in float32.

#define FLOAT_TYPE   float
#define FLOAT_TYPEV2 vec2
#define FLOAT_TYPEV4 vec4
#define DATA_A_IQ4_NL 1 // its table in shared memory
#define BINDING_IDX_K 0
#define BINDING_IDX_V 1

layout(local_size_x = 128) in;

layout(constant_id = 0) const uint FaTypeK = 0; // as upstream's decoders of stock types call them
layout(constant_id = 1) const uint FaTypeV = 0;
layout(constant_id = 2) const uint SIZE_K  = 64;
layout(constant_id = 3) const uint SIZE_V  = 64;
layout(constant_id = 4) const uint FLAGS   = 0;

const bool HAS_MASK  = (FLAGS & 1u) != 0u;
const bool IS_CACHE  = (FLAGS & 2u) != 0u; // of a recent window: keys that a row sees there are not of this part
const bool HAS_TILES = (FLAGS & 4u) != 0u; // rows have a number for each tile of keys

#include "types.glsl"
#include "fa_types.glsl"
#include "flash_attn_dequant.glsl"
#include "turbo-block.glsl"

layout(push_constant) uniform parameters {
    uint first_query, n_queries, n_keys; // of this dispatch
    uint heads; // of queries, and << 16 of keys
    uint q_query, q_head, q_stream; // floats
    uint k_key, k_head, k_stream;   // F32: floats; F16, BF16 and turbo types: 16-bit words; others: blocks
    uint v_key, v_head, v_stream;
    uint mask_query, mask_head, mask_stream; // halves
    uint mask_repeats; // heads, and << 16 streams, of the mask
    uint window_query, window_stream; // halves
    uint columns_stream, first_tile;
    float scale, softcap, max_bias;
    uint first_part, split_keys, n_splits;
    uint q_offset, k_offset, v_offset, mask_offset, window_offset_columns_offset;
} p;

layout(binding = 0) readonly buffer Q_F32  { float data[]; } q;
layout(binding = 1) readonly buffer K_F32  { float data[]; } k_f32;
layout(binding = 1) readonly buffer K_WORD { uint16_t data[]; } k_word;
layout(binding = 2) readonly buffer V_F32  { float data[]; } v_f32;
layout(binding = 2) readonly buffer V_WORD { uint16_t data[]; } v_word;
layout(binding = 3) readonly buffer MASK   { float16_t data[]; } mask;
layout(binding = 4) readonly buffer WINDOW { float16_t data[]; } window_mask;
layout(binding = 5) readonly buffer COLUMN { int data[]; } columns;
layout(binding = 6) writeonly buffer PARTS { float data[]; } parts;

const uint ROWS = 16u, KEYS = 32u, CHUNK = 16u; // of vec4
const uint STRIDE = CHUNK + 1u;
const uint CHUNKS_V = (SIZE_V + 63u)/64u;
#define HIDDEN uintBitsToFloat(0xff800000u) // -infinity

shared float codebook_k[256], codebook_v[256];
shared vec4  q_chunk[ROWS*CHUNK];
shared vec4  kv_chunk[KEYS*STRIDE];
shared float weight[ROWS*(KEYS + 1u)];
shared float reduced[128];
shared float row_scale[ROWS]; // of what was there before a tile
shared uint  is_any_seen;

uint turbo_k(uint type) { return type == turbo2_type ? 2u : type == turbo3_type ? 3u : type == turbo4_type ? 4u : 0u; }

uint units_per_row_value(uint type, uint d) { // where value d of a row is
    return turbo_k(type) != 0u ? d/TURBO_VALUES*turbo_words(turbo_k(type))
         : type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16 ? d : d/fa_block_elems(type);
}

#define TURBO_LOAD(WORDS, CODEBOOK, TYPE) {                                                                     \
    const uint k = turbo_k(TYPE), i = d % TURBO_VALUES, word = turbo_first_word(k, i);                          \
    const uint next = uint(WORDS.data[at + min(word + 1u, turbo_words(k) - 1u)]);                               \
    const uint bits = (uint(WORDS.data[at + word]) | next << 16) >> turbo_first_bit(k, i);                      \
    const float scale = turbo_scale(k, uint(WORDS.data[at]) & ((1u << (8u + k)) - 1u));                         \
    return scale*vec4(CODEBOOK[bits & 255u], CODEBOOK[(bits >> k) & 255u],                                      \
                      CODEBOOK[(bits >> (2u*k)) & 255u], CODEBOOK[(bits >> (3u*k)) & 255u]);                    \
}

float half_at(uint word) { return unpackHalf2x16(word).x; }
float bf16_at(uint word) { return uintBitsToFloat(word << 16); }

#define LOAD(F32, WORDS, CODEBOOK, TYPE, BINDING)                                            \
    const uint at = row + units_per_row_value(TYPE, d);                                      \
    if (TYPE == GGML_TYPE_F32) {                                                             \
        return vec4(F32.data[at], F32.data[at + 1u], F32.data[at + 2u], F32.data[at + 3u]);  \
    }                                                                                        \
    if (TYPE == GGML_TYPE_F16) {                                                             \
        return vec4(half_at(uint(WORDS.data[at])), half_at(uint(WORDS.data[at + 1u])),       \
                    half_at(uint(WORDS.data[at + 2u])), half_at(uint(WORDS.data[at + 3u]))); \
    }                                                                                        \
    if (TYPE == GGML_TYPE_BF16) {                                                            \
        return vec4(bf16_at(uint(WORDS.data[at])), bf16_at(uint(WORDS.data[at + 1u])),       \
                    bf16_at(uint(WORDS.data[at + 2u])), bf16_at(uint(WORDS.data[at + 3u]))); \
    }                                                                                        \
    if (turbo_k(TYPE) != 0u) TURBO_LOAD(WORDS, CODEBOOK, TYPE)                               \
    return dequantize4(at, d % fa_block_elems(TYPE), 0u, BINDING);

// Values d to d + 3 of a row of keys or values.
vec4 load_k(uint row, uint d) { LOAD(k_f32, k_word, codebook_k, FaTypeK, BINDING_IDX_K) }
vec4 load_v(uint row, uint d) { LOAD(v_f32, v_word, codebook_v, FaTypeV, BINDING_IDX_V) }

void load_codebooks(uint thread) {
    for (uint s = thread; s < 256u; s += 128u) {
        if (turbo_k(FaTypeK) != 0u) { codebook_k[s] = float(turbo_entry(turbo_k(FaTypeK), s)); }
        if (turbo_k(FaTypeV) != 0u) { codebook_v[s] = float(turbo_entry(turbo_k(FaTypeV), s)); }
    }
}

float alibi_slope(uint head, uint n_heads) {
    if (p.max_bias <= 0.0) {
        return 1.0;
    }
    const uint power = 1u << findMSB(n_heads);
    return head < power ? exp2(-p.max_bias/float(power)*float(head + 1u))
                        : exp2(-p.max_bias/2.0/float(power)*float(2u*(head - power) + 1u));
}

void main() {
    const uint thread = gl_LocalInvocationID.x;
    const uint n_heads = p.heads & 0xffffu, n_kv_heads = p.heads >> 16, group = n_heads/n_kv_heads;
    const uint kv_head = gl_WorkGroupID.y, split = gl_WorkGroupID.z % p.n_splits, stream = gl_WorkGroupID.z/p.n_splits;
    const uint n_streams = gl_NumWorkGroups.z/p.n_splits, n_rows = p.n_queries*group, first_row = gl_WorkGroupID.x*ROWS;
    const uint window_offset = p.window_offset_columns_offset & 0xffffu;
    const uint columns_offset = p.window_offset_columns_offset >> 16;

    init_iq_shmem(gl_WorkGroupSize);
    load_codebooks(thread);

    // Of scores a thread has one key of a tile, and every fourth row; of results four channels, and two rows.
    const uint key = thread % KEYS, row_begin = thread/KEYS;
    const uint column = thread % CHUNK, own_row = thread/CHUNK*2u;
    vec4 result[CHUNKS_V*2u];
    for (uint i = 0u; i < CHUNKS_V*2u; ++i) {
        result[i] = vec4(0.0);
    }
    float largest = HIDDEN, total = 0.0; // of row thread/8

    const uint begin = split*p.split_keys, end = min(begin + p.split_keys, p.n_keys);
    for (uint tile = begin; tile < end; tile += KEYS) {
        // What is seen of the tile
        if (thread == 0u) {
            is_any_seen = 0u;
        }
        barrier();
        float bias[4], added[4];
        const uint token = tile + key;
        for (uint i = 0u; i < 4u; ++i) {
            const uint row = first_row + row_begin + 4u*i;
            const uint query = p.first_query + row/group, head = kv_head*group + row % group;
            bias[i]  = HIDDEN;
            added[i] = 0.0;
            if (token < end && row < n_rows) {
                bias[i] = 0.0;
                if (HAS_MASK) {
                    const uint mask_heads = p.mask_repeats & 0xffffu, mask_streams = p.mask_repeats >> 16;
                    bias[i] = float(mask.data[p.mask_offset + query*p.mask_query + head % mask_heads*p.mask_head
                        + stream % mask_streams*p.mask_stream + token]);
                }
                if (IS_CACHE) {
                    const int in_window = columns.data[columns_offset + stream*p.columns_stream + token];
                    if (in_window >= 0 && float(window_mask.data[
                            window_offset + query*p.window_query + stream*p.window_stream + uint(in_window)])
                        != HIDDEN) {
                        bias[i] = HIDDEN;
                    }
                }
                if (bias[i] != HIDDEN) {
                    is_any_seen = 1u;
                    if (HAS_TILES) {
                        const int number =
                            columns.data[columns_offset + stream*p.columns_stream + p.first_tile + token];
                        added[i] = q.data[
                            p.q_offset + query*p.q_query + head*p.q_head + stream*p.q_stream + SIZE_K + uint(number)];
                    }
                }
            }
        }
        barrier();
        if (is_any_seen == 0u) {
            barrier();
            continue;
        }

        // Scores
        float score[4] = float[](0.0, 0.0, 0.0, 0.0);
        for (uint chunk = 0u; chunk < SIZE_K; chunk += 64u) {
            for (uint i = thread; i < KEYS*CHUNK; i += 128u) {
                const uint c = i/CHUNK, d = chunk + 4u*(i % CHUNK);
                const bool is_there = tile + c < end && d < SIZE_K;
                kv_chunk[c*STRIDE + i % CHUNK] = is_there
                    ? load_k(p.k_offset + (tile + c)*p.k_key + kv_head*p.k_head + stream*p.k_stream, d) : vec4(0.0);
            }
            for (uint i = thread; i < ROWS*CHUNK; i += 128u) {
                const uint row = first_row + i/CHUNK, d = chunk + 4u*(i % CHUNK);
                q_chunk[i] = vec4(0.0);
                if (row < n_rows && d < SIZE_K) {
                    const uint at = p.q_offset + (p.first_query + row/group)*p.q_query
                        + (kv_head*group + row % group)*p.q_head + stream*p.q_stream + d;
                    q_chunk[i] = vec4(q.data[at], q.data[at + 1u], q.data[at + 2u], q.data[at + 3u]);
                }
            }
            barrier();
            for (uint d = 0u; d < CHUNK; ++d) {
                const vec4 of_key = kv_chunk[key*STRIDE + d];
                for (uint i = 0u; i < 4u; ++i) {
                    score[i] += dot(q_chunk[(row_begin + 4u*i)*CHUNK + d], of_key);
                }
            }
            barrier();
        }
        for (uint i = 0u; i < 4u; ++i) {
            const uint row = row_begin + 4u*i;
            float s = (score[i] + added[i])*p.scale;
            s = p.softcap != 0.0 ? p.softcap*tanh(s/p.softcap) : s;
            const float slope = alibi_slope(kv_head*group + (first_row + row) % group, n_heads);
            weight[row*(KEYS + 1u) + key] = bias[i] == HIDDEN ? HIDDEN : s + slope*bias[i];
        }
        barrier();

        // Weights: eight threads a row
        const uint row = thread/8u, at = row*(KEYS + 1u) + thread % 8u*4u;
        float top = HIDDEN;
        for (uint i = 0u; i < 4u; ++i) {
            top = max(top, weight[at + i]);
        }
        reduced[thread] = top;
        barrier();
        top = largest;
        for (uint i = 0u; i < 8u; ++i) {
            top = max(top, reduced[row*8u + i]);
        }
        barrier();
        float sum = 0.0;
        for (uint i = 0u; i < 4u; ++i) {
            const float w = weight[at + i] == HIDDEN ? 0.0 : exp(weight[at + i] - top);
            weight[at + i] = w;
            sum += w;
        }
        reduced[thread] = sum;
        const float factor = largest == HIDDEN ? 0.0 : exp(largest - top);
        if (thread % 8u == 0u) {
            row_scale[row] = factor;
        }
        barrier();
        total *= factor;
        for (uint i = 0u; i < 8u; ++i) {
            total += reduced[row*8u + i];
        }
        largest = top;

        // Values
        for (uint chunk = 0u; chunk < CHUNKS_V; ++chunk) {
            for (uint i = thread; i < KEYS*CHUNK; i += 128u) {
                const uint c = i/CHUNK, d = 64u*chunk + 4u*(i % CHUNK);
                const bool is_there = tile + c < end && d < SIZE_V;
                kv_chunk[c*STRIDE + i % CHUNK] = is_there
                    ? load_v(p.v_offset + (tile + c)*p.v_key + kv_head*p.v_head + stream*p.v_stream, d) : vec4(0.0);
            }
            barrier();
            vec4 a = result[2u*chunk]*row_scale[own_row], b = result[2u*chunk + 1u]*row_scale[own_row + 1u];
            for (uint c = 0u; c < KEYS; ++c) {
                const vec4 value = kv_chunk[c*STRIDE + column];
                const float wa = weight[own_row*(KEYS + 1u) + c], wb = weight[(own_row + 1u)*(KEYS + 1u) + c];
                a += wa == 0.0 ? vec4(0.0) : wa*value; // what is hidden may be no number
                b += wb == 0.0 ? vec4(0.0) : wb*value;
            }
            result[2u*chunk]      = a;
            result[2u*chunk + 1u] = b;
            barrier();
        }
    }

    // Of each row: its result so far, its largest score, and its sum of weights
    const uint size = SIZE_V + 2u;
    const uint part = ((p.first_part + split)*n_streams + stream)*p.n_queries*n_heads;
    if (thread % 8u == 0u) {
        const uint row = first_row + thread/8u;
        if (row < n_rows) {
            const uint at = (part + row/group*n_heads + kv_head*group + row % group)*size + SIZE_V;
            parts.data[at]      = largest;
            parts.data[at + 1u] = total;
        }
    }
    for (uint i = 0u; i < CHUNKS_V*2u; ++i) {
        const uint row = first_row + own_row + i % 2u, d = i/2u*64u + 4u*column;
        if (row < n_rows && d < SIZE_V) {
            const uint at = (part + row/group*n_heads + kv_head*group + row % group)*size + d;
            for (uint j = 0u; j < 4u; ++j) {
                parts.data[at + j] = result[i][j];
            }
        }
    }
}
