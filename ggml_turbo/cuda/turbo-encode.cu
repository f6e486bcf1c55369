#include "turbo-operators.h"

#include "turbo-encode.cuh"
#include "turbo-describe.cuh"

// Rows of whole blocks, each block's values side by side.
static bool turbo_can_encode(const ggml_tensor * values, const ggml_tensor * blocks) {
    return turbo_is_type(blocks->type) && turbo_is_float(values->type) &&
        turbo_has_whole_blocks(values) && turbo_has_whole_blocks(blocks);
}

bool turbo_takes_set_rows(int device, const ggml_tensor * op) {
    GGML_UNUSED(device);
    return turbo_can_encode(op->src[0], op) && turbo_is_index(op->src[1]);
}

bool turbo_takes_encoding(int device, const ggml_tensor * op) {
    GGML_UNUSED(device);
    return turbo_can_encode(op->src[0], op) && turbo_can_copy(op->src[0], op);
}

static turbo_encode_task
turbo_task_of(const ggml_tensor * values, const ggml_tensor * blocks, const turbo_rows & rows) {
    return { turbo_describe(values), turbo_float_of(values), turbo_describe(blocks), rows };
}

static turbo_encode_task turbo_task_of(const ggml_tensor * set_rows) {
    return turbo_task_of(set_rows->src[0], set_rows, turbo_describe_rows(set_rows->src[1]));
}

static uint32_t turbo_count_blocks(const ggml_tensor * values) {
    return (uint32_t) (ggml_nelements(values)/QK_TURBO);
}

static const dim3 turbo_encode_threads(32, 2);

static void turbo_launch_encoder(ggml_backend_cuda_context & context, ggml_type type, const turbo_encode_task & task,
                                 uint32_t n) {
    if (n == 0) {
        return;
    }
    const auto launch = [&](auto kernel) {
        turbo_launch(kernel, dim3(n), turbo_encode_threads, 0, context.stream(), task);
    };
#define TURBO_LAUNCH(K, ID) case GGML_TYPE_TURBO##K: launch(turbo_encode<K>); break;
    switch (type) {
        TURBO_TYPES(TURBO_LAUNCH)
        default: GGML_ABORT("%s is no turbo type", ggml_type_name(type));
    }
#undef TURBO_LAUNCH
}

void turbo_set_rows(ggml_backend_cuda_context & context, ggml_tensor * op) {
    turbo_launch_encoder(context, op->type, turbo_task_of(op), turbo_count_blocks(op->src[0]));
}

void turbo_set_rows_of_two(ggml_backend_cuda_context & context, ggml_tensor * first, ggml_tensor * second) {
    const uint32_t n_first = turbo_count_blocks(first->src[0]), n = n_first + turbo_count_blocks(second->src[0]);
    if (n > 0) {
        turbo_launch(turbo_encode_two, dim3(n), turbo_encode_threads, 0, context.stream(), turbo_task_of(first),
                     turbo_bits(first->type), turbo_task_of(second), turbo_bits(second->type), n_first);
    }
}

void turbo_copy_encoded(ggml_backend_cuda_context & context, ggml_tensor * op) {
    if (op->src[0]->ne[0] == op->ne[0]) {
        turbo_launch_encoder(context, op->type, turbo_task_of(op->src[0], op, {}), turbo_count_blocks(op));
        return;
    }
    const ggml_tensor values = turbo_as_row(op->src[0]), blocks = turbo_as_row(op);
    turbo_launch_encoder(context, op->type, turbo_task_of(&values, &blocks, {}), turbo_count_blocks(op));
}
