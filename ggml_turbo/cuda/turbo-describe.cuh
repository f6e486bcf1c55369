#pragma once

// ggml's tensors as kernels are told of them, and what can be asked of one.

#include "turbo-tensor.cuh"

#include "format/ggml-turbo.h"

static inline bool turbo_is_float(ggml_type type) {
    return type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16;
}

static inline bool turbo_is_index(const ggml_tensor * t) {
    return t->type == GGML_TYPE_I32 || t->type == GGML_TYPE_I64;
}

// Rows that are blocks of 64 values, or pieces of 64 values that lie side by side.
static inline bool turbo_has_whole_blocks(const ggml_tensor * t) {
    return t->ne[0] % QK_TURBO == 0 && t->nb[0] == ggml_type_size(t->type);
}

static inline turbo_float turbo_float_of(const ggml_tensor * t) {
    return t->type == GGML_TYPE_F16 ? TURBO_F16 : t->type == GGML_TYPE_BF16 ? TURBO_BF16 : TURBO_F32;
}

static inline turbo_tensor turbo_describe(const ggml_tensor * t, int unit = QK_TURBO) {
    turbo_tensor out = { (char *) t->data, {}, {} };
    for (int i = 0; i < 4; ++i) {
        out.ne[i] = t->ne[i];
        out.nb[i] = (int64_t) t->nb[i];
    }
    out.ne[0] /= unit;
    out.nb[0] *= unit/ggml_blck_size(t->type);
    return out;
}

// The indices of SET_ROWS and GET_ROWS; none for others.
static inline turbo_rows turbo_describe_rows(const ggml_tensor * op) {
    if (op->op != GGML_OP_SET_ROWS && op->op != GGML_OP_GET_ROWS) {
        return {};
    }
    return { turbo_describe(op->src[1], 1), (int) ggml_type_size(op->src[1]->type) };
}
