#pragma once

// The turbo types in ggml-vulkan: SET_ROWS, GET_ROWS and CPY of them, FLASH_ATTN_EXT of them with any type of the other of keys and
// values, and attention with a recent window (ops/turbo-window.h). This file is a part of ggml-vulkan.cpp, whose functions it uses,
// and is included there once. turbo_vk_supports and turbo_vk_compute are what it calls.
//
// The shaders are our own (turbo-*.comp, compiled by our CMakeLists.txt), for every device alike: they use neither cooperative
// matrices nor subgroups, so a device's extensions and the size of its subgroups make no difference to what they compute.

#include "format/ggml-turbo.h"
#include "ops/turbo-window.h"
#include "turbo-shaders.h"

#include <map>
#include <mutex>
#include <tuple>
#include <vector>

// ---- pipelines ----

// Made when they are first needed, since each of them takes a driver a moment.
template <typename push_constants>
static vk_pipeline turbo_vk_pipeline(
        vk_device & device, const turbo_vk_words & shader, uint32_t n_buffers, const std::vector<uint32_t> & constants) {
    static std::mutex mutex;
    static std::map<std::tuple<vk_device_struct *, const char *, std::vector<uint32_t>>, vk_pipeline> known;
    std::lock_guard<std::mutex> lock(mutex);
    vk_pipeline & pipeline = known[{ device.get(), shader.name, constants }];
    if (!pipeline) {
        pipeline = std::make_shared<vk_pipeline_struct>();
        pipeline->name               = shader.name;
        pipeline->parameter_count    = n_buffers;
        pipeline->push_constant_size = sizeof(push_constants);
        pipeline->wg_denoms          = { 1, 1, 1 };
        pipeline->align              = 1;
        pipeline->initialized        = true;
        ggml_vk_create_pipeline_func(
            device, pipeline, shader.bytes, shader.words, "main", n_buffers, pipeline->wg_denoms, constants, false, false, 0);
    }
    return pipeline;
}

// What a device lacks for the shaders; null if it has all. The log says it once.
static const char * turbo_vk_missing(const vk_device & device) {
    const auto & limits = device->properties.limits;
    const char * missing = limits.maxComputeWorkGroupInvocations < 256 || limits.maxComputeWorkGroupSize[0] < 256
                             ? "workgroups of 256 invocations"
                         : limits.maxComputeSharedMemorySize < 20*1024 ? "20 KiB of shared memory for a workgroup"
                         : limits.maxPushConstantsSize < 128           ? "128 bytes of push constants" : nullptr;
    static std::once_flag said;
    if (missing) {
        std::call_once(said, [&] {
            GGML_LOG_WARN("ggml_vulkan: turbo cache types are not computed on %s: it has no %s\n", device->name.c_str(), missing);
        });
    }
    return missing;
}

// ---- rows: SET_ROWS, GET_ROWS, CPY ----

struct turbo_vk_rows {
    uint32_t n_blocks, n1, n2, n3, index_n2, index_n3;
    uint32_t float_offset, float_1, float_2, float_3;
    uint32_t word_offset, word_1, word_2, word_3;
    uint32_t index_offset, index_1, index_2, index_3;
};

// What an operator does to rows; which of its tensors are the rows of floats and of blocks.
struct turbo_vk_row_op {
    const ggml_tensor * floats, * blocks, * indices;
    bool                encodes;
};

static bool turbo_vk_is_copy(const ggml_tensor * op) {
    return op->op == GGML_OP_CPY || op->op == GGML_OP_DUP || op->op == GGML_OP_CONT;
}

static turbo_vk_row_op turbo_vk_row_op_of(const ggml_tensor * op) {
    switch (op->op) {
        case GGML_OP_SET_ROWS: return { op->src[0], op, op->src[1], true };
        case GGML_OP_GET_ROWS: return { op, op->src[0], op->src[1], false };
        default: {
            const bool encodes = turbo_is_type(op->type);
            return { encodes ? op->src[0] : op, encodes ? op : op->src[0], nullptr, encodes };
        }
    }
}

static bool turbo_vk_supports_rows(const ggml_tensor * op) {
    const turbo_vk_row_op row_op = turbo_vk_row_op_of(op);
    const ggml_tensor * floats = row_op.floats, * blocks = row_op.blocks, * indices = row_op.indices;
    const bool is_float = floats->type == GGML_TYPE_F32 || (floats->type == GGML_TYPE_F16 && row_op.encodes);
    const bool is_typed = is_float && turbo_is_type(blocks->type) && floats->nb[0] == ggml_type_size(floats->type)
                       && blocks->nb[0] == ggml_type_size(blocks->type);
    const bool is_indexed = !indices || indices->type == GGML_TYPE_I32 || (row_op.encodes && indices->type == GGML_TYPE_I64);
    const bool is_shaped  = indices || ggml_are_same_shape(floats, blocks) || (ggml_is_contiguous(floats) && ggml_is_contiguous(blocks));
    return is_typed && is_indexed && is_shaped && (!indices || indices->nb[0] == ggml_type_size(indices->type));
}

static void turbo_vk_compute_rows(ggml_backend_vk_context * ctx, vk_context & subctx, const ggml_tensor * op) {
    const turbo_vk_row_op row_op = turbo_vk_row_op_of(op);
    const ggml_tensor * floats = row_op.floats, * blocks = row_op.blocks, * indices = row_op.indices;
    const auto elements = [](size_t bytes, size_t size) { return (uint32_t) (bytes/size); };

    turbo_vk_rows p = {};
    const bool is_flat = !indices && !ggml_are_same_shape(floats, blocks);
    p.n_blocks = (is_flat ? ggml_nelements(blocks) : blocks->ne[0])/ggml_blck_size(blocks->type);
    p.n1 = is_flat ? 1 : floats->ne[1];
    p.n2 = is_flat ? 1 : floats->ne[2];
    p.n3 = is_flat ? 1 : floats->ne[3];
    p.float_offset = elements(get_misalign_bytes(ctx, floats), floats->nb[0]);
    p.float_1 = elements(floats->nb[1], floats->nb[0]);
    p.float_2 = elements(floats->nb[2], floats->nb[0]);
    p.float_3 = elements(floats->nb[3], floats->nb[0]);
    p.word_offset = elements(get_misalign_bytes(ctx, blocks), sizeof(uint16_t));
    p.word_1 = elements(blocks->nb[1], sizeof(uint16_t));
    p.word_2 = elements(blocks->nb[2], sizeof(uint16_t));
    p.word_3 = elements(blocks->nb[3], sizeof(uint16_t));
    uint32_t index_words = 0;
    if (indices) {
        const bool is_set = op->op == GGML_OP_SET_ROWS;
        index_words    = ggml_type_size(indices->type)/sizeof(uint32_t);
        p.index_offset = elements(get_misalign_bytes(ctx, indices), sizeof(uint32_t));
        p.index_1 = index_words;
        p.index_2 = elements(indices->nb[1], sizeof(uint32_t));
        p.index_3 = elements(indices->nb[2], sizeof(uint32_t));
        p.index_n2 = indices->ne[1];
        p.index_n3 = indices->ne[2];
        GGML_ASSERT(is_set || (p.index_n2 == p.n2 && p.index_n3 == p.n3));
    }
    const uint64_t n_blocks = (uint64_t) p.n_blocks*p.n1*p.n2*p.n3, n_groups = row_op.encodes ? n_blocks : CEIL_DIV(n_blocks, 16);
    const uint32_t columns  = std::min<uint64_t>(n_groups, 32768);
    vk_pipeline pipeline = turbo_vk_pipeline<turbo_vk_rows>(
        ctx->device, row_op.encodes ? turbo_vk_encode : turbo_vk_decode, 3,
        { (uint32_t) turbo_bits(blocks->type), index_words, floats->type == GGML_TYPE_F16 });
    ggml_pipeline_request_descriptor_sets(ctx, pipeline, 1);
    const vk_subbuffer of_floats = ggml_vk_tensor_subbuffer(ctx, floats, true), of_blocks = ggml_vk_tensor_subbuffer(ctx, blocks, true);
    const vk_subbuffer of_indices = indices ? ggml_vk_tensor_subbuffer(ctx, indices, true) : of_floats;
    ggml_vk_dispatch_pipeline(
        ctx, subctx, pipeline, { row_op.encodes ? of_floats : of_blocks, row_op.encodes ? of_blocks : of_floats, of_indices }, p,
        { columns, (uint32_t) CEIL_DIV(n_groups, columns), 1 });
}

// ---- attention ----

struct turbo_vk_attention_push {
    uint32_t first_query, n_queries, n_keys, heads;
    uint32_t q_query, q_head, q_stream;
    uint32_t k_key, k_head, k_stream;
    uint32_t v_key, v_head, v_stream;
    uint32_t mask_query, mask_head, mask_stream, mask_repeats;
    uint32_t window_query, window_stream, columns_stream, first_tile;
    float    scale, softcap, max_bias;
    uint32_t first_part, split_keys, n_splits;
    uint32_t q_offset, k_offset, v_offset, mask_offset, window_offset_columns_offset;
};
static_assert(sizeof(turbo_vk_attention_push) == 128, "the least that a device has of push constants");

struct turbo_vk_combine_push {
    uint32_t n_parts, n_rows, size_v, n_heads, n_queries, first_query, all_queries, has_sinks, sinks_offset, result_offset;
};

enum turbo_vk_flags { TURBO_VK_MASK = 1, TURBO_VK_CACHE = 2, TURBO_VK_TILES = 4 }; // turbo-attention.comp

// What of the parts a workgroup makes (turbo-attention.comp), and how much memory they may take: more queries wait for their turn.
static const uint32_t TURBO_VK_ROWS = 16, TURBO_VK_KEYS = 32;
static const uint64_t TURBO_VK_PARTS_BYTES = 64ull << 20;

// What the shader counts keys and values of a type in.
static uint32_t turbo_vk_unit(ggml_type type) {
    return turbo_is_type(type) ? sizeof(uint16_t) : ggml_type_size(type);
}

static bool turbo_vk_decodes(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q5_1:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_IQ4_NL:
            return true;
        default:
            return turbo_is_type(type);
    }
}

static bool turbo_vk_has_units(const ggml_tensor * t) {
    const size_t unit = turbo_vk_unit(t->type);
    return t->nb[0] == ggml_type_size(t->type) && t->nb[1] % unit == 0 && t->nb[2] % unit == 0 && t->nb[3] % unit == 0;
}

static bool turbo_vk_supports_attention(const ggml_tensor * op) {
    const ggml_tensor * q = op->src[0], * k = op->src[1], * v = op->src[2], * mask = op->src[3], * sinks = op->src[4];
    return op->type == GGML_TYPE_F32 && ggml_is_contiguous(op) && q->type == GGML_TYPE_F32 && turbo_vk_has_units(q)
        && turbo_vk_decodes(k->type) && turbo_vk_decodes(v->type) && turbo_vk_has_units(k) && turbo_vk_has_units(v)
        && k->ne[0] % 4 == 0 && v->ne[0] % 4 == 0 && k->ne[2] == v->ne[2] && q->ne[2] % k->ne[2] == 0
        && k->ne[3] == q->ne[3] && v->ne[3] == q->ne[3] && q->ne[2] < 1 << 16
        && (!mask || (mask->type == GGML_TYPE_F16 && turbo_vk_has_units(mask)))
        && (!sinks || sinks->type == GGML_TYPE_F32);
}

static bool turbo_vk_supports_window(const ggml_tensor * op) {
    const ggml_tensor * ring = op->src[TURBO_WINDOW_RING], * new_k = op->src[TURBO_WINDOW_NEW_K], * new_v = op->src[TURBO_WINDOW_NEW_V];
    const ggml_tensor * window = op->src[TURBO_WINDOW_MASK_W], * columns = op->src[TURBO_WINDOW_COLUMNS];
    return turbo_vk_supports_attention(op) && ring->type == GGML_TYPE_F16 && turbo_vk_has_units(ring)
        && (new_k->type == GGML_TYPE_F32 || new_k->type == GGML_TYPE_F16) && turbo_vk_has_units(new_k)
        && (new_v->type == GGML_TYPE_F32 || new_v->type == GGML_TYPE_F16) && turbo_vk_has_units(new_v)
        && window->type == GGML_TYPE_F16 && turbo_vk_has_units(window) && columns->type == GGML_TYPE_I32 && columns->nb[0] == 4;
}

// Keys and values that one dispatch reads, and what says which of them a query sees.
struct turbo_vk_source {
    const ggml_tensor * k, * v, * mask;
    int64_t             mask_column, v_offset; // v_offset: from the tensor that the descriptor is made of, in values
    const ggml_tensor * k_memory, * v_memory;  // of the descriptors
    uint32_t            flags, first_tile;
    uint32_t            n_splits, first_part;
};

static void turbo_vk_compute_attention(ggml_backend_vk_context * ctx, vk_context & subctx, const ggml_tensor * op) {
    const bool has_window = turbo_is_window_attention(op);
    const ggml_tensor * q = op->src[0], * k = op->src[1], * v = op->src[2], * mask = op->src[3], * sinks = op->src[4];
    const ggml_tensor * window  = has_window ? op->src[TURBO_WINDOW_MASK_W] : nullptr;
    const ggml_tensor * columns = has_window ? op->src[TURBO_WINDOW_COLUMNS] : nullptr;
    const uint32_t n_queries = q->ne[1], n_heads = q->ne[2], n_kv_heads = k->ne[2], n_streams = q->ne[3], n_kv = k->ne[1];
    const uint32_t size_k = k->ne[0], size_v = v->ne[0];
    float scale, max_bias, softcap;
    const float * factors = has_window ? turbo_window_params(op) : (const float *) op->op_params;
    memcpy(&scale, factors, sizeof(float)), memcpy(&max_bias, factors + 1, sizeof(float)), memcpy(&softcap, factors + 2, sizeof(float));

    // The sources
    std::vector<turbo_vk_source> sources;
    const uint32_t tiles = has_window && turbo_window_biases(op) > 0 ? TURBO_VK_TILES : 0;
    const uint32_t masked = mask ? TURBO_VK_MASK : 0;
    ggml_tensor ring_k, ring_v;
    if (!has_window) {
        sources.push_back({ k, v, mask, 0, 0, k, v, masked, 0, 1, 0 });
    } else {
        turbo_window_ring(op, &ring_k, &ring_v);
        const ggml_tensor * ring = op->src[TURBO_WINDOW_RING], * new_k = op->src[TURBO_WINDOW_NEW_K], * new_v = op->src[TURBO_WINDOW_NEW_V];
        const uint32_t n_slots = ring->ne[1];
        sources.push_back({ k, v, mask, 0, 0, k, v, masked | tiles | TURBO_VK_CACHE, n_kv, 1, 0 });
        sources.push_back({ &ring_k, &ring_v, window, 0, (int64_t) n_kv_heads*size_k, ring, ring, TURBO_VK_MASK | tiles, 2*n_kv, 1, 0 });
        sources.push_back({ new_k, new_v, window, n_slots, 0, new_k, new_v, TURBO_VK_MASK | tiles, 2*n_kv + n_slots, 1, 0 });
    }

    // Few queries read many keys: the cache is split, so that there is work for the whole device
    const uint32_t group = n_heads/n_kv_heads;
    const uint64_t n_groups = (uint64_t) CEIL_DIV((uint64_t) n_queries*group, TURBO_VK_ROWS)*n_kv_heads*n_streams;
    const uint64_t wanted = 4*std::max<uint64_t>(ctx->device->shader_core_count, 16);
    const uint32_t n_splits = std::clamp<uint64_t>(wanted/n_groups, 1, CEIL_DIV(n_kv, 8*TURBO_VK_KEYS));
    const uint32_t split_keys = CEIL_DIV(CEIL_DIV(n_kv, n_splits), TURBO_VK_KEYS)*TURBO_VK_KEYS;
    sources[0].n_splits = CEIL_DIV(n_kv, split_keys);
    uint32_t n_parts = 0;
    for (turbo_vk_source & source : sources) {
        source.first_part = n_parts;
        n_parts += source.n_splits;
    }

    // Memory for the parts of as many queries as fit
    const uint64_t query_bytes = (uint64_t) n_parts*n_streams*n_heads*(size_v + 2)*sizeof(float);
    const uint32_t at_once = std::clamp<uint64_t>(TURBO_VK_PARTS_BYTES/query_bytes, 1, n_queries);
    const uint64_t bytes = at_once*query_bytes;
    if (ctx->prealloc_size_split_k < bytes) {
        ctx->prealloc_size_split_k = bytes;
        ggml_vk_preallocate_buffers(ctx, subctx);
    }

    const auto offset = [ctx](const ggml_tensor * t, uint32_t unit) { return get_misalign_bytes(ctx, t)/unit; };
    const auto strides = [](const ggml_tensor * t, int dimension) { return (uint32_t) (t->nb[dimension]/turbo_vk_unit(t->type)); };
    const auto buffer = [ctx](const ggml_tensor * t) { return ggml_vk_tensor_subbuffer(ctx, t, true); };
    const vk_subbuffer parts = { ctx->prealloc_split_k, 0, bytes }, of_q = buffer(q);

    for (uint32_t first = 0; first < n_queries; first += at_once) {
        const uint32_t n_now = std::min(at_once, n_queries - first);
        if (ctx->prealloc_split_k_need_sync || first > 0) {
            ggml_vk_sync_buffers(ctx, subctx);
        }
        for (const turbo_vk_source & source : sources) {
            turbo_vk_attention_push p = {};
            p.first_query = first, p.n_queries = n_now, p.n_keys = source.k->ne[1], p.heads = n_heads | n_kv_heads << 16;
            p.q_query = strides(q, 1), p.q_head = strides(q, 2), p.q_stream = strides(q, 3);
            p.k_key = strides(source.k, 1), p.k_head = strides(source.k, 2), p.k_stream = strides(source.k, 3);
            p.v_key = strides(source.v, 1), p.v_head = strides(source.v, 2), p.v_stream = strides(source.v, 3);
            if (source.mask) {
                p.mask_query = strides(source.mask, 1), p.mask_head = strides(source.mask, 2), p.mask_stream = strides(source.mask, 3);
                p.mask_repeats = (uint32_t) source.mask->ne[2] | (uint32_t) source.mask->ne[3] << 16;
                p.mask_offset  = offset(source.mask, sizeof(ggml_fp16_t)) + source.mask_column;
            }
            if (has_window) {
                p.window_query = strides(window, 1), p.window_stream = strides(window, 3), p.columns_stream = strides(columns, 3);
                p.first_tile = source.first_tile;
                p.window_offset_columns_offset = offset(window, sizeof(ggml_fp16_t)) | offset(columns, sizeof(int32_t)) << 16;
            }
            p.scale = scale, p.softcap = softcap, p.max_bias = max_bias;
            p.first_part = source.first_part, p.n_splits = source.n_splits;
            p.split_keys = source.n_splits > 1 ? split_keys : CEIL_DIV(p.n_keys, TURBO_VK_KEYS)*TURBO_VK_KEYS;
            p.q_offset = offset(q, sizeof(float)), p.k_offset = offset(source.k_memory, turbo_vk_unit(source.k->type));
            p.v_offset = offset(source.v_memory, turbo_vk_unit(source.v->type)) + source.v_offset;
            vk_pipeline pipeline = turbo_vk_pipeline<turbo_vk_attention_push>(
                ctx->device, turbo_vk_attention, 7, { (uint32_t) source.k->type, (uint32_t) source.v->type, size_k, size_v, source.flags });
            ggml_pipeline_request_descriptor_sets(ctx, pipeline, 1);
            ggml_vk_dispatch_pipeline(
                ctx, subctx, pipeline,
                { of_q, buffer(source.k_memory), buffer(source.v_memory), source.mask ? buffer(source.mask) : of_q,
                  window ? buffer(window) : of_q, columns ? buffer(columns) : of_q, parts }, p,
                { (uint32_t) CEIL_DIV(n_now*group, TURBO_VK_ROWS), n_kv_heads, n_streams*source.n_splits });
        }
        ggml_vk_sync_buffers(ctx, subctx);
        turbo_vk_combine_push p = {};
        p.n_parts = n_parts, p.n_rows = n_streams*n_now*n_heads, p.size_v = size_v, p.n_heads = n_heads, p.n_queries = n_now;
        p.first_query = first, p.all_queries = n_queries, p.has_sinks = sinks != nullptr;
        p.sinks_offset  = sinks ? offset(sinks, sizeof(float)) : 0;
        p.result_offset = offset(op, sizeof(float));
        vk_pipeline pipeline = turbo_vk_pipeline<turbo_vk_combine_push>(ctx->device, turbo_vk_combine, 3, {});
        ggml_pipeline_request_descriptor_sets(ctx, pipeline, 1);
        const uint32_t n_columns = std::min<uint32_t>(p.n_rows, 32768);
        ggml_vk_dispatch_pipeline(
            ctx, subctx, pipeline, { parts, sinks ? buffer(sinks) : parts, buffer(op) }, p, { n_columns, CEIL_DIV(p.n_rows, n_columns), 1 });
    }
    ctx->prealloc_split_k_need_sync = true;
}

// ---- what ggml-vulkan.cpp calls ----

// 1 or 0: the device computes a node or not; -1: it has nothing of ours, and ggml-vulkan decides.
static int turbo_vk_supports(const vk_device & device, const ggml_tensor * op) {
    const bool is_window = turbo_is_window_attention(op);
    const bool is_attention = is_window
        || (op->op == GGML_OP_FLASH_ATTN_EXT && (turbo_is_type(op->src[1]->type) || turbo_is_type(op->src[2]->type)));
    const bool is_rows = ((op->op == GGML_OP_SET_ROWS || turbo_vk_is_copy(op)) && turbo_is_type(op->type))
        || ((op->op == GGML_OP_GET_ROWS || turbo_vk_is_copy(op)) && turbo_is_type(op->src[0]->type));
    if (!is_attention && !is_rows) {
        return -1;
    }
    return !turbo_vk_missing(device)
        && (is_window ? turbo_vk_supports_window(op) : is_attention ? turbo_vk_supports_attention(op) : turbo_vk_supports_rows(op));
}

// Whether a node was one of ours, which is then computed.
static bool turbo_vk_compute(ggml_backend_vk_context * ctx, vk_context & subctx, const ggml_tensor * op) {
    if (turbo_vk_supports(ctx->device, op) != 1) {
        return false;
    }
    if (op->op == GGML_OP_FLASH_ATTN_EXT || op->op == GGML_OP_CUSTOM) {
        turbo_vk_compute_attention(ctx, subctx, op);
    } else {
        turbo_vk_compute_rows(ctx, subctx, op);
    }
    return true;
}
