#include "turbo-window.h"

#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

// What op_params holds: first what ggml's custom operators have there. It is copied in and out, since op_params is aligned
// for less than a pointer.
struct params {
    ggml_custom_op_t fun;
    int              n_tasks;
    void           * userdata;
    float            factors[3]; // scale, max_bias, softcap
};

struct part {
    const struct ggml_tensor * k, * v, * mask;
    int64_t                    column; // of the mask, of the first key
    int64_t                    tile;   // in COLUMNS, of the first key
};

static const char * row_of(const struct ggml_tensor * t, int64_t token, int64_t head, int64_t stream) {
    return (const char *) t->data + token*t->nb[1] + head*t->nb[2] + stream*t->nb[3];
}

static void decode(const struct ggml_tensor * t, int64_t token, int64_t head, int64_t stream, float * to) {
    const char * from = row_of(t, token, head, stream);
    if (t->type == GGML_TYPE_F32) {
        memcpy(to, from, t->ne[0]*sizeof(float));
    } else {
        ggml_get_type_traits(t->type)->to_float(from, to, t->ne[0]);
    }
}

static const ggml_fp16_t * mask_of(const struct part * p, int64_t query, int64_t head, int64_t stream) {
    return (const ggml_fp16_t *) row_of(p->mask, query, head % p->mask->ne[2], stream % p->mask->ne[3]) + p->column;
}

float turbo_alibi_slope(int64_t head, int64_t n_heads, float max_bias) {
    if (max_bias <= 0.0f) {
        return 1.0f;
    }
    const int64_t power = (int64_t) 1 << (int) floorf(log2f((float) n_heads));
    return head < power ? powf(2.0f, -max_bias/power*(head + 1)) : powf(2.0f, -max_bias/2/power*(2*(head - power) + 1));
}

// The reference: one query of one head after the other, with an online softmax.
static void compute(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    (void) userdata;
    struct ggml_tensor ** src = dst->src;
    const struct ggml_tensor * q = src[TURBO_WINDOW_Q], * sinks = src[TURBO_WINDOW_SINKS];
    struct ggml_tensor ring_k, ring_v;
    turbo_window_ring(dst, &ring_k, &ring_v);
    const int64_t n_kv = src[TURBO_WINDOW_K]->ne[1], n_slots = ring_k.ne[1];
    const struct part parts[3] = {
        { src[TURBO_WINDOW_K],     src[TURBO_WINDOW_V],     src[TURBO_WINDOW_MASK],   0,       n_kv },
        { &ring_k,                 &ring_v,                 src[TURBO_WINDOW_MASK_W], 0,       2*n_kv },
        { src[TURBO_WINDOW_NEW_K], src[TURBO_WINDOW_NEW_V], src[TURBO_WINDOW_MASK_W], n_slots, 2*n_kv + n_slots },
    };
    const bool has_tiles = turbo_window_biases(dst) > 0;
    const float * factors = turbo_window_params(dst);
    const float   scale = factors[0], max_bias = factors[1], softcap = factors[2];
    const int64_t size_k = parts[0].k->ne[0], size_v = dst->ne[0], n_heads = q->ne[2], group = n_heads/parts[0].k->ne[2];
    float * key = malloc((size_k + size_v)*sizeof(float)), * value = key + size_k;

    const int64_t n_rows = q->ne[1]*n_heads*q->ne[3];
    for (int64_t row = ith; row < n_rows; row += nth) {
        const int64_t head = row % n_heads, query = row/n_heads % q->ne[1], stream = row/n_heads/q->ne[1];
        const float * x     = (const float *) row_of(q, query, head, stream);
        const float   slope = turbo_alibi_slope(head, n_heads, max_bias);
        float * out = (float *) ((char *) dst->data + head*dst->nb[1] + query*dst->nb[2] + stream*dst->nb[3]);
        float largest = -INFINITY, total = 0.0f;
        const int32_t * columns = (const int32_t *) row_of(src[TURBO_WINDOW_COLUMNS], 0, 0, stream);
        const ggml_fp16_t * window_mask = mask_of(&parts[1], query, head, stream);
        memset(out, 0, size_v*sizeof(float));
        for (int i = 0; i < 3; ++i) {
            const struct part * p = &parts[i];
            const ggml_fp16_t * mask = mask_of(p, query, head, stream);
            for (int64_t token = 0; token < p->k->ne[1]; ++token) {
                const float bias = ggml_fp16_to_fp32(mask[token]);
                const bool is_in_window = i == 0 && columns[token] >= 0 && ggml_fp16_to_fp32(window_mask[columns[token]]) != -INFINITY;
                if (bias == -INFINITY || is_in_window) {
                    continue;
                }
                decode(p->k, token, head/group, stream, key);
                float score = has_tiles ? x[size_k + columns[p->tile + token]] : 0.0f;
                for (int64_t d = 0; d < size_k; ++d) {
                    score += x[d]*key[d];
                }
                score = (softcap != 0.0f ? softcap*tanhf(score*scale/softcap) : score*scale) + slope*bias;
                const float top = score > largest ? score : largest;
                const float factor = largest == -INFINITY ? 0.0f : expf(largest - top), weight = expf(score - top);
                decode(p->v, token, head/group, stream, value);
                for (int64_t d = 0; d < size_v; ++d) {
                    out[d] = out[d]*factor + weight*value[d];
                }
                total   = total*factor + weight;
                largest = top;
            }
        }
        if (sinks) { // one more key, without a value
            const float sink = ((const float *) sinks->data)[head];
            const float top  = sink > largest ? sink : largest;
            const float factor = largest == -INFINITY ? 0.0f : expf(largest - top);
            for (int64_t d = 0; d < size_v; ++d) {
                out[d] *= factor;
            }
            total = total*factor + expf(sink - top);
        }
        for (int64_t d = 0; d < size_v && total > 0.0f; ++d) {
            out[d] /= total;
        }
    }
    free(key);
}

struct ggml_tensor * turbo_window_attention(
        struct ggml_context * ctx, struct ggml_tensor * const sources[TURBO_WINDOW_SOURCES], float scale, float max_bias, float softcap) {
    const struct ggml_tensor * q = sources[TURBO_WINDOW_Q], * v = sources[TURBO_WINDOW_V];
    struct ggml_tensor * op = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, v->ne[0], q->ne[2], q->ne[1], q->ne[3]);
    struct params params;
    memset(&params, 0, sizeof(params)); // graphs are compared by their bytes, padding included
    params.fun = compute;
    params.n_tasks = GGML_N_TASKS_MAX;
    params.factors[0] = scale, params.factors[1] = max_bias, params.factors[2] = softcap;
    _Static_assert(sizeof(params) <= GGML_MAX_OP_PARAMS, "");
    _Static_assert((int) TURBO_WINDOW_SOURCES <= GGML_MAX_SRC, "");
    memcpy(op->op_params, &params, sizeof(params));
    op->op = GGML_OP_CUSTOM;
    for (int i = 0; i < TURBO_WINDOW_SOURCES; ++i) {
        op->src[i] = sources[i];
    }
    return op;
}

bool turbo_is_window_attention(const struct ggml_tensor * op) {
    struct params params;
    memcpy(&params, op->op_params, sizeof(params));
    return op->op == GGML_OP_CUSTOM && params.fun == compute;
}

int64_t turbo_window_biases(const struct ggml_tensor * op) {
    return op->src[TURBO_WINDOW_Q]->ne[0] - op->src[TURBO_WINDOW_K]->ne[0];
}

void turbo_window_ring(const struct ggml_tensor * op, struct ggml_tensor * k, struct ggml_tensor * v) {
    const struct ggml_tensor * ring = op->src[TURBO_WINDOW_RING];
    const int64_t kv_heads = op->src[TURBO_WINDOW_K]->ne[2];
    *k = *v = *ring;
    k->ne[0] = op->src[TURBO_WINDOW_K]->ne[0];
    v->ne[0] = op->src[TURBO_WINDOW_V]->ne[0];
    k->ne[2] = v->ne[2] = kv_heads;
    k->nb[2] = k->ne[0]*k->nb[0];
    v->nb[2] = v->ne[0]*v->nb[0];
    v->data  = (char *) v->data + kv_heads*k->nb[2];
}

const float * turbo_window_params(const struct ggml_tensor * op) {
    return (const float *) ((const char *) op->op_params + offsetof(struct params, factors));
}
