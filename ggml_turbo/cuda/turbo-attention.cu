#include "turbo-operators.h"

#include "turbo-plan.cuh"
#include "turbo-tensor.cuh"

static turbo_device turbo_describe_device(int device) {
    const auto & info = ggml_cuda_info().devices[device];
#if defined(GGML_USE_HIP)
    const uint32_t begin = 0;
#else
    const uint32_t begin = info.cc >= 900 ? 1024 : 0; // from 9.0 on, the first KiB of a block's shared memory is the system's
#endif
    return { info.nsm, (int) info.smpbo, begin };
}

bool turbo_takes_attention(int device, const ggml_tensor * op) {
    return turbo_attention_is_ours(op) && turbo_attention_takes(op, turbo_describe_device(device));
}

void turbo_compute_attention(ggml_backend_cuda_context & context, ggml_tensor * op) {
    const turbo_device   device = turbo_describe_device(context.device);
    turbo_attention_plan plan   = turbo_plan_attention(op, device);
    ggml_cuda_pool_alloc<float>  partials(context.pool(), plan.partial_floats());
    ggml_cuda_pool_alloc<float2> sums(context.pool(), plan.partial_sums());
    plan.op.partials     = partials.get();
    plan.op.partial_sums = sums.get();
    for (int i = 0; i < plan.n_parts; ++i) {
        const turbo_attention_launch & launch = plan.parts[i];
        turbo_with_kernel(launch, [&](auto k, auto v, auto chunks) {
            const auto kernel = turbo_attend<decltype(k)::value, decltype(v)::value, decltype(chunks)::value>;
            CUDA_SET_SHARED_MEMORY_LIMIT(kernel, device.shared_bytes);
            turbo_launch(kernel, dim3(launch.blocks), dim3(launch.threads), launch.shared_bytes, context.stream(), plan.op, launch.part);
        });
    }
    if (plan.op.n_ranges > 1) {
        turbo_launch(turbo_combine, dim3((unsigned) plan.rows()), dim3(std::min(plan.op.size_v, 256)), 0, context.stream(), plan.op);
    }
}
