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

static void turbo_launch_encoder(ggml_backend_cuda_context & context, const ggml_tensor * values,
                                 const ggml_tensor * blocks, const turbo_rows & rows) {
    const int64_t n = ggml_nelements(values)/QK_TURBO;
    if (n == 0) {
        return;
    }
    const auto launch = [&](auto kernel) {
        turbo_launch(kernel, dim3((unsigned) n), dim3(32, 2), 0, context.stream(), turbo_describe(values),
                     turbo_float_of(values), turbo_describe(blocks), rows);
    };
#define TURBO_LAUNCH(K, ID) case GGML_TYPE_TURBO##K: launch(turbo_encode<K>); break;
    switch (blocks->type) {
        TURBO_TYPES(TURBO_LAUNCH)
        default: GGML_ABORT("%s is no turbo type", ggml_type_name(blocks->type));
    }
#undef TURBO_LAUNCH
}

void turbo_set_rows(ggml_backend_cuda_context & context, ggml_tensor * op) {
    turbo_launch_encoder(context, op->src[0], op, turbo_describe_rows(op->src[1]));
}

void turbo_copy_encoded(ggml_backend_cuda_context & context, ggml_tensor * op) {
    if (op->src[0]->ne[0] == op->ne[0]) {
        turbo_launch_encoder(context, op->src[0], op, {});
        return;
    }
    const ggml_tensor values = turbo_as_row(op->src[0]), blocks = turbo_as_row(op);
    turbo_launch_encoder(context, &values, &blocks, {});
}
