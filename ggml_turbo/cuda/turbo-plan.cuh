#pragma once

// From an attention node of ggml to launches of kernels: what is supported, how keys and rows are divided among blocks
// of threads. No call of CUDA's: the emulator takes this, too.

#include "turbo-prefill.cuh"

#include "ggml-turbo.h"
#include "ops/turbo-window.h"

#include <algorithm>

// What of a device decides.
struct turbo_device {
    int      multiprocessors;
    int      shared_bytes; // of shared memory that a block of threads can have; a multiprocessor has hardly more
    uint32_t shared_begin; // where it begins in its address space
};

struct turbo_attention_launch {
    turbo_attention_part part;
    int    k, v;   // bits of the types of keys and values, 0 for stock types
    int    chunks; // that a warp has of a head
    int    slab_keys; // 0, or: keys are unpacked so many at a time (turbo-prefill.cuh)
    int    blocks, threads;
    int    shared_bytes;
};

struct turbo_attention_plan {
    turbo_attention_op     op;
    int                    n_parts;
    turbo_attention_launch parts[3];

    int64_t rows() const { return (int64_t) op.n_rows()*op.n_kv_heads*op.n_streams; } // blocks of turbo_combine
    bool has_partials() const {
        return op.n_ranges > 1 || (parts[0].slab_keys > 0 && parts[0].slab_keys < parts[0].part.n_keys);
    }
    size_t partial_floats() const { return has_partials() ? rows()*op.n_ranges*op.size_v : 0; }
    size_t partial_sums() const { return has_partials() ? rows()*op.n_ranges : 0; }
    size_t slab_words() const { // of keys, and as many of values
        const turbo_attention_launch & cache = parts[0];
        const int keys = std::min(cache.slab_keys, cache.part.n_keys),
                  tiles = (keys + TURBO_TILE_KEYS - 1)/TURBO_TILE_KEYS;
        return (size_t) op.n_streams/op.stream_group*op.n_kv_heads*tiles*cache.chunks*turbo_slab_words;
    }
};

// Bits of keys and of values, 0 for stock types; chunks. Kernels of two chunks are for heads of 128.
#if !defined(TURBO_ATTENTION_KERNELS) // some tests compile fewer
#define TURBO_ATTENTION_KERNELS(X)                                                                    \
    X(2, 2, 2) X(2, 3, 2) X(2, 4, 2) X(3, 2, 2) X(3, 3, 2) X(3, 4, 2) X(4, 2, 2) X(4, 3, 2) X(4, 4, 2) \
    X(2, 2, 1) X(2, 3, 1) X(2, 4, 1) X(3, 2, 1) X(3, 3, 1) X(3, 4, 1) X(4, 2, 1) X(4, 3, 1) X(4, 4, 1) \
    X(2, 0, 1) X(3, 0, 1) X(4, 0, 1) X(0, 2, 1) X(0, 3, 1) X(0, 4, 1) X(0, 0, 1)
#endif

// Calls f with the numbers of the launch's kernel as constants.
template<typename F> static void turbo_with_kernel(const turbo_attention_launch & launch, F && f) {
#define TURBO_KERNEL(K, V, CHUNKS)                                             \
    if (launch.k == K && launch.v == V && launch.chunks == CHUNKS) {           \
        f(turbo_constant<K>(), turbo_constant<V>(), turbo_constant<CHUNKS>()); \
        return;                                                                \
    }
    TURBO_ATTENTION_KERNELS(TURBO_KERNEL)
#undef TURBO_KERNEL
}

// ---- from ggml ----

static inline bool turbo_is_aligned(const void * data, size_t a, size_t b, size_t c) {
    return (((uintptr_t) data | a | b | c) & 3) == 0;
}

static inline turbo_attention_source turbo_source_of(const ggml_tensor * t) {
    turbo_stock type = TURBO_STOCK_F32;
    switch (t->type) {
        case GGML_TYPE_F16:  type = TURBO_STOCK_F16;  break;
        case GGML_TYPE_BF16: type = TURBO_STOCK_BF16; break;
        case GGML_TYPE_Q8_0: type = TURBO_STOCK_Q8_0; break;
        case GGML_TYPE_Q4_0: type = TURBO_STOCK_Q4_0; break;
        default: break;
    }
    return { (const char *) t->data, (int64_t) t->nb[1], (int64_t) t->nb[2], (int64_t) t->nb[3], type,
             turbo_is_aligned(t->data, t->nb[1], t->nb[2], t->nb[3]) };
}

static inline bool turbo_is_source(const ggml_tensor * t) {
    const bool stock = t->type == GGML_TYPE_F32 || t->type == GGML_TYPE_F16 || t->type == GGML_TYPE_BF16 ||
                       t->type == GGML_TYPE_Q8_0 || t->type == GGML_TYPE_Q4_0;
    return stock || turbo_is_type(t->type);
}

static inline turbo_attention_mask turbo_mask_of(const ggml_tensor * t, int64_t column) {
    if (!t) {
        return { nullptr, 0, 0, 0, 1, 1, true };
    }
    const uint16_t * data = (const uint16_t *) t->data + column;
    return { data, (uint32_t) (t->nb[1]/2), (uint32_t) (t->nb[2]/2), (uint32_t) (t->nb[3]/2),
             (int) t->ne[2], (int) t->ne[3], turbo_is_aligned(data, t->nb[1], t->nb[2], t->nb[3]) };
}

// Keys, values and masks of a node's parts.
struct turbo_attention_tensors {
    struct {
        const ggml_tensor * k, * v, * mask;
    } parts[3];
    int         n_parts;
    ggml_tensor ring_k, ring_v; // of parts[1]

    explicit turbo_attention_tensors(const ggml_tensor * node) : n_parts(1) {
        parts[0] = { node->src[1], node->src[2], node->src[3] };
        if (turbo_is_window_attention(node)) {
            turbo_window_ring(node, &ring_k, &ring_v);
            const ggml_tensor * mask = node->src[TURBO_WINDOW_MASK_W];
            parts[1] = { &ring_k, &ring_v, mask };
            parts[2] = { node->src[TURBO_WINDOW_NEW_K], node->src[TURBO_WINDOW_NEW_V], mask };
            n_parts  = 3;
        }
    }
    turbo_attention_tensors(const turbo_attention_tensors &) = delete;
};

// ---- what is supported ----

// How far its memory reaches, in bytes.
static inline uint64_t turbo_extent(const ggml_tensor * t) {
    return t->ne[1]*t->nb[1] + t->ne[2]*t->nb[2] + t->ne[3]*t->nb[3];
}

static inline int
turbo_shared_bytes(const turbo_attention_launch & launch, int warps, int slices, const turbo_device & device) {
    int bytes = 0;
    turbo_with_kernel(launch, [&](auto k, auto v, auto chunks) {
        using kernel = turbo_attention<decltype(k)::value, decltype(v)::value, decltype(chunks)::value>;
        bytes = 4*kernel::shared_words(warps, slices, device.shared_begin);
    });
    return bytes;
}

static inline int turbo_slices(const turbo_attention_op & op) {
    return (std::max(op.size_k, op.size_v) + QK_TURBO - 1)/QK_TURBO;
}

static constexpr int turbo_most_warps = 12; // for which a multiprocessor has registers

// Attention with the recent window, and FLASH_ATTN_EXT of turbo keys or values; of other types it is not ours.
static inline bool turbo_attention_is_ours(const ggml_tensor * node) {
    return turbo_is_window_attention(node) ||
           (node->op == GGML_OP_FLASH_ATTN_EXT &&
            (turbo_is_type(node->src[1]->type) || turbo_is_type(node->src[2]->type)));
}

static inline turbo_attention_plan turbo_plan_attention(const ggml_tensor * node, const turbo_device & device);

static inline bool turbo_attention_takes(const ggml_tensor * node, const turbo_device & device) {
    const turbo_attention_tensors tensors(node);
    const ggml_tensor * q = node->src[0], * sinks = node->src[4], * k = tensors.parts[0].k, * v = tensors.parts[0].v;
    for (int i = 0; i < tensors.n_parts; ++i) {
        const auto & p = tensors.parts[i];
        for (const ggml_tensor * t : { p.k, p.v }) {
            const int64_t size = t == p.k ? k->ne[0] : v->ne[0];
            if (!turbo_is_source(t) || t->ne[0] != size || size % QK_TURBO != 0 || size/QK_TURBO > turbo_most_warps ||
                t->nb[0] != ggml_type_size(t->type) || t->ne[1] != p.k->ne[1] || t->ne[2] != k->ne[2] ||
                t->ne[3] != k->ne[3] || (t->nb[1] | t->nb[2] | t->nb[3]) % 2 != 0 || t->ne[1]*t->nb[1] > UINT32_MAX) {
                return false;
            }
        }
        if (p.mask && (p.mask->type != GGML_TYPE_F16 || p.mask->nb[0] != sizeof(ggml_fp16_t) ||
                       turbo_extent(p.mask)/2 > UINT32_MAX)) {
            return false;
        }
    }
    if (q->type != GGML_TYPE_F32 || q->nb[0] != sizeof(float) ||
        (q->nb[1] | q->nb[2] | q->nb[3]) % sizeof(float) != 0 || q->ne[2] % k->ne[2] != 0 || q->ne[3] % k->ne[3] != 0 ||
        k->ne[1] == 0 || k->ne[1] > INT32_MAX - 1024 ||
        (sinks && (sinks->type != GGML_TYPE_F32 || sinks->nb[0] != sizeof(float)))) {
        return false;
    }
    const turbo_attention_plan plan = turbo_plan_attention(node, device);
    for (int i = 0; i < plan.n_parts; ++i) {
        if (plan.parts[i].shared_bytes > device.shared_bytes || plan.parts[i].blocks <= 0) {
            return false;
        }
    }
    return plan.rows() <= INT32_MAX;
}

// ---- how it is divided ----

// How many warps a block of threads has. Registers are enough for 12 of a multiprocessor: as three blocks, which hide
// each other's beginnings and ends, where shared memory has room for their tables; else as one.
static inline int turbo_plan_warps(const turbo_attention_launch & launch, int slices, const turbo_device & device) {
    constexpr int few = 4;
    if (slices > 1) {
        return slices;
    }
    int warps = few;
    if (turbo_most_warps/few*turbo_shared_bytes(launch, few, 1, device) > device.shared_bytes) {
        while (warps < turbo_most_warps && turbo_shared_bytes(launch, warps + 1, 1, device) <= device.shared_bytes) {
            ++warps;
        }
    }
    return warps;
}

// Whether so many rows attend to a cache that unpacking it once for all is less work than decoding it for each 16.
static constexpr int turbo_slab_rows = 64, turbo_slab_warps = 8;

// Keys of a slab of all streams together: memory that is the same for any context.
#if !defined(TURBO_SLAB_KEYS) // tests have smaller ones
#define TURBO_SLAB_KEYS 8192
#endif

static inline bool turbo_plan_slab(const turbo_attention_op & op, turbo_attention_launch & launch) {
    if (op.n_rows() < turbo_slab_rows || op.size_k != op.size_v || (op.size_k != QK_TURBO && op.size_k != 2*QK_TURBO)) {
        return false;
    }
    const int64_t rows = TURBO_TILE_ROWS*turbo_slab_warps,
                  blocks = (op.n_rows() + rows - 1)/rows*op.n_kv_heads*op.n_streams;
    launch.chunks    = op.size_k/QK_TURBO;
    launch.slab_keys = std::max(TURBO_SLAB_KEYS/(op.n_streams/op.stream_group), 64)/TURBO_TILE_KEYS*TURBO_TILE_KEYS;
    launch.threads   = 32*turbo_slab_warps;
    launch.blocks    = blocks <= INT32_MAX ? (int) blocks : 0;
    launch.shared_bytes = 4*(launch.chunks == 2 ? turbo_slab_attention<2>::shared_words(turbo_slab_warps)
                                                : turbo_slab_attention<1>::shared_words(turbo_slab_warps));
    launch.part.range_keys = launch.part.n_keys;
    launch.part.n_ranges   = 1;
    return true;
}

// Divides keys into ranges, so that there are blocks of threads for all multiprocessors. It depends on shapes alone.
static inline void
turbo_plan_part(const turbo_attention_op & op, turbo_attention_launch & launch, const turbo_device & device) {
    turbo_attention_part & part = launch.part;
    const bool pairs = launch.k && launch.v && op.size_k == 2*QK_TURBO && op.size_v == 2*QK_TURBO &&
                       part.k.aligned && part.v.aligned;
    launch.chunks = pairs ? 2 : 1;
    const int slices = pairs ? 1 : turbo_slices(op), warps = turbo_plan_warps(launch, slices, device);
    launch.threads      = 32*warps;
    launch.shared_bytes = turbo_shared_bytes(launch, warps, slices, device);

    const int64_t blocks = (int64_t) op.n_kv_heads*op.n_tiles()*op.n_streams;
    const int64_t wanted = (int64_t) device.multiprocessors*std::max(1, turbo_most_warps/warps);
    const int     step   = TURBO_TILE_KEYS*(slices > 1 ? 1 : warps); // each warp has a tile of its own, or all have one
    const int     steps  = (part.n_keys + step - 1)/step;
    const int     ranges = (int) std::max<int64_t>(1, std::min<int64_t>(wanted/blocks, steps));
    part.range_keys = (steps + ranges - 1)/ranges*step;
    part.n_ranges   = (part.n_keys + part.range_keys - 1)/part.range_keys;
    launch.blocks   = blocks*part.n_ranges <= INT32_MAX ? (int) (blocks*part.n_ranges) : 0;
}

static inline turbo_attention_plan turbo_plan_attention(const ggml_tensor * node, const turbo_device & device) {
    const turbo_attention_tensors tensors(node);
    const bool has_window = turbo_is_window_attention(node);
    const ggml_tensor * q = node->src[0], * sinks = node->src[4], * k = tensors.parts[0].k, * v = tensors.parts[0].v;
    const float * factors = has_window ? turbo_window_params(node) : (const float *) node->op_params;

    turbo_attention_plan plan = {};
    turbo_attention_op & op = plan.op;
    op.q = (const char *) q->data;
    op.q_query = q->nb[1], op.q_head = q->nb[2], op.q_stream = q->nb[3];
    op.size_k = (int) k->ne[0], op.size_v = (int) v->ne[0];
    op.n_queries = (int) q->ne[1], op.n_heads = (int) q->ne[2], op.n_kv_heads = (int) k->ne[2],
    op.n_streams = (int) q->ne[3];
    op.group = op.n_heads/op.n_kv_heads, op.stream_group = (int) (q->ne[3]/k->ne[3]);
    op.scale = factors[0], op.max_bias = factors[1], op.softcap = factors[2];
    op.sinks = sinks ? (const float *) sinks->data : nullptr;
    op.dst = (float *) node->data;
    op.dst_head   = (int64_t) (node->nb[1]/sizeof(float));
    op.dst_query  = (int64_t) (node->nb[2]/sizeof(float));
    op.dst_stream = (int64_t) (node->nb[3]/sizeof(float));

    plan.n_parts = tensors.n_parts;
    int64_t column = 0; // of the window's mask
    const int64_t n_keys = k->ne[1];
    int64_t tile = n_keys; // in COLUMNS, of the part's first key
    for (int i = 0; i < plan.n_parts; ++i) {
        const auto & p = tensors.parts[i];
        turbo_attention_launch & launch = plan.parts[i];
        turbo_attention_part   & part   = launch.part;
        part.k = turbo_source_of(p.k), part.v = turbo_source_of(p.v);
        part.n_keys = (int) p.k->ne[1];
        part.mask   = turbo_mask_of(p.mask, i == 0 ? 0 : column);
        part.window = turbo_mask_of(nullptr, 0);
        if (has_window) {
            const ggml_tensor * columns = node->src[TURBO_WINDOW_COLUMNS];
            if (i == 0) {
                part.columns = (const char *) columns->data;
                part.window  = turbo_mask_of(tensors.parts[1].mask, 0);
            } else {
                column += part.n_keys;
            }
            if (turbo_window_biases(node) > 0) {
                part.tiles = (const char *) columns->data + tile*sizeof(int32_t);
                tile += part.n_keys;
            }
            part.columns_stream = columns->nb[3];
        }
        launch.k = turbo_bits(p.k->type), launch.v = turbo_bits(p.v->type);
        part.first_range = op.n_ranges;
        if (i > 0 || !turbo_plan_slab(op, launch)) {
            turbo_plan_part(op, launch, device);
        }
        op.n_ranges += part.n_ranges;
    }
    return plan;
}
