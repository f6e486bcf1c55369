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

// Rows of units that lie side by side; kernels count units in 32 bits.
static inline bool turbo_has_whole_blocks(const ggml_tensor * t) {
    return t->ne[0] % QK_TURBO == 0 && t->nb[0] == ggml_type_size(t->type) && ggml_nelements(t)/QK_TURBO <= INT32_MAX;
}

static inline uint32_t turbo_count_rows(const ggml_tensor * t) {
    return (uint32_t) ggml_nrows(t);
}

static inline turbo_float turbo_float_of(const ggml_tensor * t) {
    return t->type == GGML_TYPE_F16 ? TURBO_F16 : t->type == GGML_TYPE_BF16 ? TURBO_BF16 : TURBO_F32;
}

static inline turbo_tensor turbo_describe(const ggml_tensor * t, int unit = QK_TURBO) {
    turbo_tensor out = { (char *) t->data, {}, {} };
    for (int i = 0; i < 4; ++i) {
        out.ne[i] = (uint32_t) (i == 0 ? t->ne[0]/unit : t->ne[i]);
        out.nb[i] = (int64_t) (i == 0 ? t->nb[0]*unit/ggml_blck_size(t->type) : t->nb[i]);
    }
    return out;
}

// The indices of SET_ROWS and GET_ROWS.
static inline turbo_rows turbo_describe_rows(const ggml_tensor * index) {
    return { turbo_describe(index, 1), (int) ggml_type_size(index->type) };
}

// CPY takes any two shapes of as many elements. Ours go row by row: rows are as long, or both are one long row.
static inline bool turbo_can_copy(const ggml_tensor * from, const ggml_tensor * to) {
    return from->ne[0] == to->ne[0] || (ggml_is_contiguous(from) && ggml_is_contiguous(to));
}

// The same elements as one row, where they lie side by side.
static inline ggml_tensor turbo_as_row(const ggml_tensor * t) {
    ggml_tensor row = *t;
    row.ne[0] = ggml_nelements(t);
    row.ne[1] = row.ne[2] = row.ne[3] = 1;
    return row;
}
