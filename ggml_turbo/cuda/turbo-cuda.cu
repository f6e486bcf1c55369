#include "turbo-operators.h"

#include "ggml-cuda/common.cuh"
#include "ops/turbo-window.h"

#include <algorithm>
#include <iterator>

static bool turbo_takes_any(int device, const ggml_tensor * op) {
    GGML_UNUSED(device);
    GGML_UNUSED(op);
    return true;
}

// Everything that devices do with our types. A node is computed by the first line that takes it.
static const turbo_operator turbo_operators[] = {
    { GGML_OP_SET_ROWS,       turbo_takes_set_rows,  turbo_set_rows },
    { GGML_OP_GET_ROWS,       turbo_takes_get_rows,  turbo_get_rows },
    { GGML_OP_CPY,            turbo_takes_encoding,  turbo_copy_encoded },
    { GGML_OP_CPY,            turbo_takes_decoding,  turbo_copy_decoded },
    { GGML_OP_CPY,            turbo_takes_copy,      turbo_copy_blocks },
    { GGML_OP_DUP,            turbo_takes_copy,      turbo_copy_blocks },
    { GGML_OP_CONT,           turbo_takes_copy,      turbo_copy_blocks },
    { GGML_OP_FLASH_ATTN_EXT, turbo_takes_attention, turbo_compute_attention },
    { GGML_OP_CUSTOM,         turbo_takes_attention, turbo_compute_attention },
    { GGML_OP_MUL_MAT,        turbo_takes_mul_mat,   nullptr },
    { GGML_OP_MUL_MAT_ID,     turbo_takes_mul_mat,   nullptr },
    { GGML_OP_NONE,           turbo_takes_any,       nullptr },
    { GGML_OP_RESHAPE,        turbo_takes_any,       nullptr },
    { GGML_OP_VIEW,           turbo_takes_any,       nullptr },
    { GGML_OP_PERMUTE,        turbo_takes_any,       nullptr },
    { GGML_OP_TRANSPOSE,      turbo_takes_any,       nullptr },
};

static bool turbo_is_ours(const ggml_tensor * op) {
    bool ours = turbo_is_type(op->type) || turbo_is_window_attention(op);
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        ours = ours || (op->src[i] && turbo_is_type(op->src[i]->type));
    }
    return ours;
}

static const turbo_operator * turbo_find_operator(int device, const ggml_tensor * op) {
    for (const turbo_operator & o : turbo_operators) {
        if (o.op == op->op && o.takes(device, op)) {
            return &o;
        }
    }
    return nullptr;
}

int ggml_cuda_turbo_supports(int device, const ggml_tensor * op) {
    return turbo_is_ours(op) ? turbo_find_operator(device, op) != nullptr : -1;
}

bool ggml_cuda_turbo_compute(ggml_backend_cuda_context & context, ggml_tensor * op) {
    const turbo_operator * o = turbo_is_ours(op) ? turbo_find_operator(context.device, op) : nullptr;
    if (!o || !o->compute) {
        return false;
    }
    o->compute(context, op);
    return true;
}

// ---- two nodes in one launch ----

// The most rows that keys and values are encoded of together. With more, a launch less makes no difference, and
// launches of one type each have more blocks of threads on a multiprocessor at a time.
static constexpr int64_t turbo_few_rows = 16;

static bool turbo_sets_few_rows(int device, const ggml_tensor * op) {
    return op->op == GGML_OP_SET_ROWS && (op->flags & GGML_TENSOR_FLAG_COMPUTE) != 0 &&
        ggml_nrows(op->src[0]) <= turbo_few_rows && ggml_cuda_turbo_supports(device, op) == 1;
}

static bool turbo_computes_nothing(const ggml_tensor * op) {
    return std::any_of(std::begin(turbo_operators), std::end(turbo_operators),
                       [op](const turbo_operator & o) { return o.op == op->op && o.takes == turbo_takes_any; });
}

// The tensor that owns its memory.
static const ggml_tensor * turbo_owner(const ggml_tensor * t) {
    return t->view_src ? t->view_src : t;
}

int ggml_cuda_turbo_fuse(ggml_backend_cuda_context & context, ggml_tensor ** nodes, int n) {
    // On another stream than the first, keys and values are computed at the same time: none waits for the other.
    if (context.curr_stream_no != 0 || !turbo_sets_few_rows(context.device, nodes[0])) {
        return 0;
    }
    int next = 1;
    while (next < n && turbo_computes_nothing(nodes[next])) { // between the two nothing is computed
        ++next;
    }
    if (next == n || !turbo_sets_few_rows(context.device, nodes[next]) ||
        turbo_owner(nodes[next]) == turbo_owner(nodes[0])) { // of one cache: rows may be the same, the second stays
        return 0;
    }
    turbo_set_rows_of_two(context, nodes[0], nodes[next]);
    return next;
}
