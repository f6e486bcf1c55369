#include "turbo-operators.h"

#include "turbo-plan.cuh"
#include "turbo-tensor.cuh"

static turbo_device turbo_describe_device(int device) {
    const auto & info = ggml_cuda_info().devices[device];
#if defined(GGML_USE_HIP)
    const uint32_t begin = 0;
#else
    // From 9.0 on, the first KiB of a block's shared memory is the system's.
    const uint32_t begin = info.cc >= 900 ? 1024 : 0;
#endif
    return { info.nsm, (int) info.smpbo, begin };
}

bool turbo_takes_attention(int device, const ggml_tensor * op) {
    return turbo_attention_is_ours(op) && turbo_attention_takes(op, turbo_describe_device(device));
}

template<bool VALUES>
static void turbo_unpack_slab(ggml_backend_cuda_context & context, const turbo_attention_plan & plan, int bits,
                              uint32_t * slab, int first, int n) {
    const turbo_attention_launch & launch = plan.parts[0];
    const turbo_attention_source & source = VALUES ? launch.part.v : launch.part.k;
    const turbo_device device = turbo_describe_device(context.device);
    const int tiles = (n + TURBO_TILE_KEYS - 1)/TURBO_TILE_KEYS, each = turbo_unpack_warps*turbo_unpack_tiles;
    const dim3 grid((tiles + each - 1)/each, plan.op.n_kv_heads*launch.chunks, plan.op.n_streams/plan.op.stream_group);
    const auto unpack = [&](auto k) { // another function for each kernel, which has its own limit of memory
        const auto kernel = turbo_unpack<decltype(k)::value, VALUES>;
        CUDA_SET_SHARED_MEMORY_LIMIT(kernel, device.shared_bytes);
        turbo_launch(kernel, grid, dim3(32*turbo_unpack_warps), turbo_unpack_shared_bytes(bits, device.shared_begin),
                     context.stream(), source, slab, launch.chunks, first, n);
    };
#define TURBO_UNPACK(K, ID) case K: unpack(turbo_constant<K>()); break;
    switch (bits) {
        TURBO_TYPES(TURBO_UNPACK)
        default: unpack(turbo_constant<0>()); break;
    }
#undef TURBO_UNPACK
}

// Attends to a cache of which slab after slab is unpacked.
static void turbo_compute_slabs(ggml_backend_cuda_context & context, const turbo_attention_plan & plan) {
    const turbo_attention_launch & launch = plan.parts[0];
    ggml_cuda_pool_alloc<uint32_t> keys(context.pool(), plan.slab_words()), values(context.pool(), plan.slab_words());
    for (int first = 0; first < launch.part.n_keys; first += launch.slab_keys) {
        turbo_attention_part part = launch.part;
        part.n_keys = std::min(launch.slab_keys, launch.part.n_keys - first);
        part.mask.data = part.mask.data ? part.mask.data + first : nullptr;
        part.columns   = part.columns ? part.columns + first*sizeof(int32_t) : nullptr;
        part.tiles     = part.tiles ? part.tiles + first*sizeof(int32_t) : nullptr;
        turbo_unpack_slab<false>(context, plan, launch.k, keys.get(), first, part.n_keys);
        turbo_unpack_slab<true>(context, plan, launch.v, values.get(), first, part.n_keys);
        const turbo_slab slab = { keys.get(), values.get(), (part.n_keys + TURBO_TILE_KEYS - 1)/TURBO_TILE_KEYS,
                                  first == 0, first + part.n_keys == launch.part.n_keys };
        turbo_launch(launch.chunks == 2 ? turbo_attend_slab<2> : turbo_attend_slab<1>, dim3(launch.blocks),
                     dim3(launch.threads), launch.shared_bytes, context.stream(), plan.op, part, slab);
    }
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
        if (launch.slab_keys > 0) {
            turbo_compute_slabs(context, plan);
            continue;
        }
        turbo_with_kernel(launch, [&](auto k, auto v, auto chunks) {
            const auto kernel = turbo_attend<decltype(k)::value, decltype(v)::value, decltype(chunks)::value>;
            CUDA_SET_SHARED_MEMORY_LIMIT(kernel, device.shared_bytes);
            turbo_launch(kernel, dim3(launch.blocks), dim3(launch.threads), launch.shared_bytes, context.stream(),
                         plan.op, launch.part);
        });
    }
    if (plan.op.n_ranges > 1) {
        turbo_launch(turbo_combine, dim3((unsigned) plan.rows()), dim3(std::min(plan.op.size_v, 256)), 0,
                     context.stream(), plan.op);
    }
}
