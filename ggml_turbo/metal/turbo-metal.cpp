#include "turbo-metal.h"

#include "turbo-args.h"

#include "format/ggml-turbo.h"
#include "ggml-backend-impl.h"
#include "ggml-impl.h"
#include "ops/turbo-window.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

static const char turbo_source[] =
#include "turbo-source.inc" // turbo.metal with all that it includes, by flatten.py
;

// ---- pipelines and dispatches ----

// What a device has of ours: kernels, which are compiled when the first node needs them, and memory for what kernels of
// one node leave to each other. That is behind no result, where llama.cpp has such memory: it allows none to others.
// A buffer that has become too small may still be read by commands that wait, so it stays until the end; sizes double,
// so that all of them take no more than twice the last one.
struct turbo_device {
    ggml_metal_library_t             library = nullptr; // null, too, if the system's compiler does not take the source
    bool                             is_compiled = false;
    std::vector<ggml_metal_buffer_t> scratch;
    size_t                           scratch_bytes = 0;

    ~turbo_device() { // before the device, which was there before this
        for (ggml_metal_buffer_t buffer : scratch) {
            ggml_metal_buffer_free(buffer);
        }
        ggml_metal_library_free(library);
    }
};

static std::mutex turbo_mutex; // several threads encode

static turbo_device & turbo_of(ggml_metal_device_t device) {
    static std::map<ggml_metal_device_t, turbo_device> known;
    return known[device];
}

static ggml_metal_library_t turbo_library(ggml_metal_device_t device) {
    const std::lock_guard<std::mutex> lock(turbo_mutex);
    turbo_device & of_device = turbo_of(device);
    if (!of_device.is_compiled) {
        of_device.library     = ggml_metal_library_init_from_source(device, turbo_source, true);
        of_device.is_compiled = true;
    }
    return of_device.library;
}

static ggml_metal_buffer_id turbo_scratch(ggml_metal_device_t device, size_t bytes) {
    const std::lock_guard<std::mutex> lock(turbo_mutex);
    turbo_device & of_device = turbo_of(device);
    if (of_device.scratch_bytes < bytes) {
        of_device.scratch_bytes = 1 << 20;
        while (of_device.scratch_bytes < bytes) {
            of_device.scratch_bytes *= 2;
        }
        of_device.scratch.push_back(ggml_metal_buffer_init(device, of_device.scratch_bytes, false));
        GGML_ASSERT(of_device.scratch.back() && "there is no memory for the parts of attention, or lists of columns");
    }
    ggml_metal_buffer_t buffer = of_device.scratch.back();
    ggml_tensor whole = {};
    whole.type  = GGML_TYPE_I8;
    whole.ne[0] = (int64_t) bytes;
    whole.ne[1] = whole.ne[2] = whole.ne[3] = 1;
    whole.nb[0] = 1;
    whole.nb[1] = whole.nb[2] = whole.nb[3] = bytes;
    whole.data  = ggml_metal_buffer_get_base(buffer);
    return ggml_metal_buffer_get_id(buffer, &whole);
}

typedef std::initializer_list<std::pair<int, int>> turbo_constants; // values by their numbers

static ggml_metal_pipeline_with_params turbo_pipeline(
        ggml_metal_device_t device, const std::string & kernel, turbo_constants constants) {
    std::string name = kernel;
    for (const auto & [number, value] : constants) {
        name += "_" + std::to_string(number) + "=" + std::to_string(value);
    }
    ggml_metal_library_t library = turbo_library(device);
    ggml_metal_pipeline_with_params pipeline = ggml_metal_library_get_pipeline(library, name.c_str());
    if (!pipeline.pipeline) {
        ggml_metal_cv_t values = ggml_metal_cv_init();
        for (int number = TURBO_CONSTANT_TYPE; number <= TURBO_CONSTANT_FLAGS; ++number) { // each kernel uses some
            ggml_metal_cv_set_int32(values, 0, number);
        }
        for (const auto & [number, value] : constants) {
            ggml_metal_cv_set_int32(values, value, number);
        }
        pipeline = ggml_metal_library_compile_pipeline(library, kernel.c_str(), name.c_str(), values);
        ggml_metal_cv_free(values);
    }
    return pipeline;
}

static ggml_metal_buffer_id turbo_buffer(const ggml_tensor * t, size_t offset = 0) {
    ggml_backend_buffer_t buffer = t->view_src ? t->view_src->buffer : t->buffer;
    ggml_metal_buffer_id  id     = ggml_metal_buffer_get_id((ggml_metal_buffer_t) buffer->context, t);
    id.offs += offset;
    return id;
}

struct turbo_grid {
    int64_t x, y, z;
};

template <typename args_t>
static void turbo_dispatch(
        ggml_metal_encoder_t encoder, ggml_metal_pipeline_with_params pipeline, args_t args,
        std::initializer_list<ggml_metal_buffer_id> buffers, size_t threadgroup_bytes, turbo_grid grid, int threads) {
    ggml_metal_encoder_set_pipeline(encoder, pipeline);
    ggml_metal_encoder_set_bytes(encoder, &args, sizeof(args), 0);
    int i = 1;
    for (const ggml_metal_buffer_id & buffer : buffers) {
        ggml_metal_encoder_set_buffer(encoder, buffer, i++);
    }
    if (threadgroup_bytes > 0) {
        ggml_metal_encoder_set_threadgroup_memory_size(encoder, GGML_PAD(threadgroup_bytes, 16), 0);
    }
    ggml_metal_encoder_dispatch_threadgroups(encoder, (int) grid.x, (int) grid.y, (int) grid.z, threads, 1, 1);
}

static int64_t turbo_ceil(int64_t n, int64_t by) {
    return (n + by - 1)/by;
}

// ---- rows: SET_ROWS, GET_ROWS, CPY ----

static bool turbo_is_float(const ggml_tensor * t) {
    return t->type == GGML_TYPE_F32 || t->type == GGML_TYPE_F16;
}

// The number that kernels know a type by.
static int turbo_number(ggml_type type) {
    return turbo_is_type(type)           ? turbo_bits(type)
         : type == GGML_TYPE_F16         ? TURBO_VALUES_F16
         : type == GGML_TYPE_Q8_0        ? TURBO_VALUES_Q8_0
         : type == GGML_TYPE_Q4_0        ? TURBO_VALUES_Q4_0 : TURBO_VALUES_F32;
}

// Rows of whole blocks that lie side by side.
static bool turbo_has_whole_blocks(const ggml_tensor * t) {
    return t->ne[0] % QK_TURBO == 0 && t->nb[0] == ggml_type_size(t->type);
}

// Kernels count what they go through in 32 bits.
static bool turbo_is_counted(const ggml_tensor * t) {
    return ggml_nelements(t) <= INT32_MAX;
}

// CPY takes any two shapes of as many elements. Ours go row by row: rows are alike, or both tensors are one long row.
static bool turbo_can_copy(const ggml_tensor * from, const ggml_tensor * to) {
    return ggml_are_same_shape(from, to) || (ggml_is_contiguous(from) && ggml_is_contiguous(to));
}

static bool turbo_are_rows(const ggml_tensor * floats, const ggml_tensor * blocks) {
    return turbo_is_float(floats) && turbo_is_type(blocks->type) && turbo_has_whole_blocks(floats)
        && turbo_is_counted(floats) && turbo_has_whole_blocks(blocks);
}

static bool turbo_are_indices(const ggml_tensor * t) {
    return (t->type == GGML_TYPE_I64 || t->type == GGML_TYPE_I32) && t->nb[0] == ggml_type_size(t->type);
}

static bool turbo_takes_set_rows(const ggml_tensor * op) {
    return turbo_are_rows(op->src[0], op) && turbo_are_indices(op->src[1]);
}

static bool turbo_takes_get_rows(const ggml_tensor * op) {
    return op->type == GGML_TYPE_F32 && turbo_are_rows(op, op->src[0]) && op->src[1]->type == GGML_TYPE_I32
        && turbo_are_indices(op->src[1]);
}

static bool turbo_takes_encoding(const ggml_tensor * op) {
    return turbo_are_rows(op->src[0], op) && turbo_can_copy(op->src[0], op);
}

static bool turbo_takes_decoding(const ggml_tensor * op) {
    return turbo_are_rows(op, op->src[0]) && turbo_can_copy(op->src[0], op);
}

static bool turbo_takes_copy(const ggml_tensor * op) {
    const ggml_tensor * from = op->src[0];
    return turbo_is_type(op->type) && from->type == op->type && turbo_has_whole_blocks(from) && turbo_is_counted(from)
        && turbo_has_whole_blocks(op) && turbo_can_copy(from, op);
}

static const std::string turbo_encode_kernel = "turbo_encode", turbo_decode_kernel = "turbo_decode";
static const std::string turbo_copy_kernel   = "turbo_copy";

// What goes from rows of one tensor to rows of another; with `index`, the second one's rows are those it names.
static void turbo_dispatch_rows(
        ggml_metal_device_t device, ggml_metal_encoder_t encoder, const std::string & kernel, const ggml_tensor * first,
        const ggml_tensor * second, const ggml_tensor * index) {
    const bool encodes = kernel == turbo_encode_kernel, copies = kernel == turbo_copy_kernel;
    const bool is_flat = !index && !ggml_are_same_shape(first, second);
    turbo_rows_args args = {};
    const int64_t n_blocks = (is_flat ? ggml_nelements(first) : first->ne[0])/QK_TURBO;
    args.n_units = (uint32_t) (copies ? n_blocks*ggml_type_size(first->type)/2 : n_blocks);
    args.n1      = is_flat ? 1 : (uint32_t) first->ne[1];
    args.n2      = is_flat ? 1 : (uint32_t) first->ne[2];
    args.n3      = is_flat ? 1 : (uint32_t) first->ne[3];
    args.first_1 = first->nb[1], args.first_2 = first->nb[2], args.first_3 = first->nb[3];
    args.second_1 = second->nb[1], args.second_2 = second->nb[2], args.second_3 = second->nb[3];
    args.index_n2 = args.index_n3 = 1;
    if (index) {
        args.index_n2 = (uint32_t) index->ne[1], args.index_n3 = (uint32_t) index->ne[2];
        args.index_1 = index->nb[0], args.index_2 = index->nb[1], args.index_3 = index->nb[2];
    }
    const int64_t units  = (int64_t) args.n_units*args.n1;
    const int64_t at_once = encodes ? 1 : copies ? 16*TURBO_DECODED_AT_ONCE : TURBO_DECODED_AT_ONCE;
    turbo_dispatch(
        encoder,
        turbo_pipeline(device, kernel, {
            { TURBO_CONSTANT_TYPE, turbo_number(first->type) },
            { TURBO_CONSTANT_BITS, turbo_bits(second->type) },
            { TURBO_CONSTANT_INDEX, index ? (int) ggml_type_size(index->type) : 0 },
        }),
        args, { turbo_buffer(first), turbo_buffer(second), turbo_buffer(index ? index : first) },
        encodes ? sizeof(turbo_encode_memory) : copies ? 0 : sizeof(turbo_decode_memory),
        { turbo_ceil(units, at_once), args.n2, args.n3 }, encodes ? 64 : 16*TURBO_DECODED_AT_ONCE);
}

static void turbo_encode_set_rows(ggml_metal_device_t device, ggml_metal_encoder_t encoder, const ggml_tensor * op) {
    turbo_dispatch_rows(device, encoder, turbo_encode_kernel, op->src[0], op, op->src[1]);
}

static void turbo_encode_get_rows(ggml_metal_device_t device, ggml_metal_encoder_t encoder, const ggml_tensor * op) {
    turbo_dispatch_rows(device, encoder, turbo_decode_kernel, op, op->src[0], op->src[1]);
}

static void turbo_encode_encoding(ggml_metal_device_t device, ggml_metal_encoder_t encoder, const ggml_tensor * op) {
    turbo_dispatch_rows(device, encoder, turbo_encode_kernel, op->src[0], op, nullptr);
}

static void turbo_encode_decoding(ggml_metal_device_t device, ggml_metal_encoder_t encoder, const ggml_tensor * op) {
    turbo_dispatch_rows(device, encoder, turbo_decode_kernel, op, op->src[0], nullptr);
}

static void turbo_encode_copy(ggml_metal_device_t device, ggml_metal_encoder_t encoder, const ggml_tensor * op) {
    turbo_dispatch_rows(device, encoder, turbo_copy_kernel, op->src[0], op, nullptr);
}

// ---- MUL_MAT, MUL_MAT_ID ----

static bool turbo_takes_mul_mat(const ggml_tensor * op) {
    const ggml_tensor * weights = op->src[0], * columns = op->src[1];
    return turbo_is_type(weights->type) && turbo_has_whole_blocks(weights) && columns->type == GGML_TYPE_F32
        && columns->nb[0] == sizeof(float) && op->type == GGML_TYPE_F32 && op->nb[0] == sizeof(float);
}

static bool turbo_takes_mul_mat_id(const ggml_tensor * op) {
    return turbo_takes_mul_mat(op) && turbo_are_indices(op->src[2]) && op->src[2]->type == GGML_TYPE_I32
        && turbo_is_counted(op->src[2]);
}

static void turbo_encode_mul_mat(ggml_metal_device_t device, ggml_metal_encoder_t encoder, const ggml_tensor * op) {
    const ggml_tensor * weights = op->src[0], * columns = op->src[1], * ids = op->src[2];
    turbo_mul_mat_args args = {};
    args.n_values  = (uint32_t) weights->ne[0];
    args.n_rows    = (uint32_t) weights->ne[1];
    args.n_columns = (uint32_t) op->ne[1];
    args.distinct  = (uint32_t) columns->ne[1];
    args.n_slices  = (uint32_t) op->ne[2];
    args.repeats_2 = (uint32_t) (op->ne[2]/weights->ne[2]), args.repeats_3 = (uint32_t) (op->ne[3]/weights->ne[3]);
    args.weight_1 = weights->nb[1], args.weight_2 = weights->nb[2], args.weight_3 = weights->nb[3];
    args.column_1 = columns->nb[1], args.column_2 = columns->nb[2], args.column_3 = columns->nb[3];
    args.product_1 = op->nb[1], args.product_2 = op->nb[2], args.product_3 = op->nb[3];
    ggml_metal_buffer_id lists = turbo_buffer(columns);
    if (ids) {
        args.n_slices  = (uint32_t) weights->ne[2];
        args.repeats_2 = 1;
        args.n_used    = (uint32_t) ids->ne[0], args.n_ids = (uint32_t) ggml_nelements(ids);
        args.id_1 = ids->nb[0], args.id_2 = ids->nb[1];
        args.n_columns = (uint32_t) ids->ne[1]; // of an expert, unless a token names it twice
        lists = turbo_scratch(device, args.n_slices*(1 + (size_t) args.n_ids)*sizeof(uint32_t));
        ggml_metal_encoder_memory_barrier(encoder); // what was there has been read
        turbo_dispatch(
            encoder, turbo_pipeline(device, "turbo_list_columns", {}), args, { turbo_buffer(ids), lists }, 0,
            { args.n_slices, 1, 1 }, 32);
        ggml_metal_encoder_memory_barrier(encoder);
    }
    const int64_t n_groups = turbo_ceil(args.n_columns, TURBO_COLUMNS);
    args.columns_step = (uint32_t) n_groups*TURBO_COLUMNS;
    turbo_dispatch(
        encoder,
        turbo_pipeline(device, "turbo_mul_mat", {
            { TURBO_CONSTANT_BITS, turbo_bits(weights->type) }, { TURBO_CONSTANT_FLAGS, ids ? TURBO_HAS_EXPERTS : 0 },
        }),
        args, { turbo_buffer(weights), turbo_buffer(columns), turbo_buffer(op), lists }, sizeof(turbo_mul_mat_memory),
        { turbo_ceil(args.n_rows, TURBO_KEYS), n_groups, ids ? args.n_slices : op->ne[2]*op->ne[3] }, 128);
}

// ---- attention ----

// How many threadgroups there should be at least, where there are so many keys: some for each core of any device.
static const int64_t TURBO_WANTED_GROUPS = 256;
static const int64_t TURBO_SPLIT_TILES   = 8; // of a part, at least
// The most that the parts of several queries may take: more queries wait for their turn.
static const int64_t TURBO_PARTS_BYTES = 32ll << 20;

static bool turbo_has_kernel(int64_t size_v) {
    return size_v == 64 || size_v == 128 || size_v == 192 || size_v == 256 || size_v == 320 || size_v == 512
        || size_v == 576;
}

// Of a threadgroup: as many as its registers hold the results of.
static int64_t turbo_rows_at_once(int64_t n_rows, int64_t size_v) {
    return n_rows <= 8 ? 8 : size_v > 256 ? 16 : 32;
}

// The most threadgroup memory that kernels may take: half of what a device has, so that two fit beside each other.
static const size_t TURBO_MOST_BYTES = 16*1024;

static size_t turbo_attention_bytes(int64_t rows_at_once) {
    return rows_at_once == 8  ? sizeof(turbo_attention_memory<1>)
         : rows_at_once == 16 ? sizeof(turbo_attention_memory<2>) : sizeof(turbo_attention_memory<4>);
}

static bool turbo_is_read(const ggml_tensor * t) {
    const bool is_stock = turbo_is_float(t) || t->type == GGML_TYPE_Q8_0 || t->type == GGML_TYPE_Q4_0;
    return (turbo_is_type(t->type) || is_stock) && t->ne[0] % QK_TURBO == 0
        && t->nb[0] == ggml_type_size(t->type);
}

static bool turbo_is_mask(const ggml_tensor * t) {
    return t->type == GGML_TYPE_F16 && t->nb[0] == sizeof(ggml_fp16_t);
}

static bool turbo_takes_attention(const ggml_tensor * op) {
    const ggml_tensor * q = op->src[0], * k = op->src[1], * v = op->src[2], * mask = op->src[3], * sinks = op->src[4];
    return op->type == GGML_TYPE_F32 && ggml_is_contiguous(op) && q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float)
        && turbo_is_read(k) && turbo_is_read(v) && turbo_has_kernel(v->ne[0]) && k->ne[2] == v->ne[2]
        && q->ne[2] % k->ne[2] == 0 && k->ne[3] == q->ne[3] && v->ne[3] == q->ne[3] && (!mask || turbo_is_mask(mask))
        && (!sinks || sinks->type == GGML_TYPE_F32);
}

static bool turbo_takes_window(const ggml_tensor * op) {
    if (!turbo_is_window_attention(op)) {
        return false;
    }
    const ggml_tensor * ring = op->src[TURBO_WINDOW_RING], * columns = op->src[TURBO_WINDOW_COLUMNS];
    const ggml_tensor * new_k = op->src[TURBO_WINDOW_NEW_K], * new_v = op->src[TURBO_WINDOW_NEW_V];
    return turbo_takes_attention(op) && ring->type == GGML_TYPE_F16 && ring->nb[0] == sizeof(ggml_fp16_t)
        && turbo_is_read(new_k) && turbo_is_read(new_v) && turbo_is_mask(op->src[TURBO_WINDOW_MASK_W])
        && columns->type == GGML_TYPE_I32 && columns->nb[0] == sizeof(int32_t);
}

// Keys and values that one dispatch reads, and what says which of them a query sees.
struct turbo_attention_source {
    const ggml_tensor * k, * v, * mask;
    size_t              mask_offset, v_offset; // bytes; v's from the tensor that has the values
    const ggml_tensor * k_memory, * v_memory;
    uint32_t            flags, first_tile;
    int64_t             n_splits, split_keys;
};

// How a node is computed.
struct turbo_attention_plan {
    std::vector<turbo_attention_source> sources;
    ggml_tensor ring_k, ring_v;
    int64_t     n_queries, n_heads, n_kv_heads, n_streams, group, size_v;
    int64_t     rows_at_once;  // of a threadgroup
    int64_t     n_parts, parts_bytes, at_once; // at_once: queries

    explicit turbo_attention_plan(const ggml_tensor * op) {
        const ggml_tensor * q = op->src[0], * k = op->src[1], * v = op->src[2], * mask = op->src[3];
        const bool has_window = turbo_is_window_attention(op);
        n_queries = q->ne[1], n_heads = q->ne[2], n_kv_heads = k->ne[2], n_streams = q->ne[3], size_v = v->ne[0];
        group = n_heads/n_kv_heads;
        const uint32_t n_kv = (uint32_t) k->ne[1], has_mask = mask ? TURBO_HAS_MASK : 0;
        const uint32_t has_tiles = has_window && turbo_window_biases(op) > 0 ? TURBO_HAS_TILES : 0;
        if (!has_window) {
            sources.push_back({ k, v, mask, 0, 0, k, v, has_mask, 0, 1, n_kv });
        } else {
            turbo_window_ring(op, &ring_k, &ring_v);
            const ggml_tensor * ring = op->src[TURBO_WINDOW_RING], * window = op->src[TURBO_WINDOW_MASK_W];
            const ggml_tensor * new_k = op->src[TURBO_WINDOW_NEW_K], * new_v = op->src[TURBO_WINDOW_NEW_V];
            const uint32_t n_slots = (uint32_t) ring->ne[1], flags = TURBO_HAS_MASK | has_tiles;
            const size_t   values  = n_kv_heads*ring_k.nb[2];
            sources.push_back({ k, v, mask, 0, 0, k, v, has_mask | TURBO_HAS_CACHE | has_tiles, n_kv, 1, n_kv });
            sources.push_back({ &ring_k, &ring_v, window, 0, values, ring, ring, flags, 2*n_kv, 1, n_slots });
            const uint32_t new_tile = 2*n_kv + n_slots;
            sources.push_back({ new_k, new_v, window, 2*n_slots, 0, new_k, new_v, flags, new_tile, 1, new_k->ne[1] });
        }
        // Few queries read many keys: the cache is split, so that there is work for the whole device.
        rows_at_once = turbo_rows_at_once(n_queries*group, size_v);
        const int64_t n_groups = turbo_ceil(n_queries*group, rows_at_once)*n_kv_heads*n_streams;
        const int64_t tiles    = turbo_ceil(n_kv, TURBO_KEYS);
        const int64_t most     = std::min(TURBO_WANTED_GROUPS/n_groups, turbo_ceil(tiles, TURBO_SPLIT_TILES));
        const int64_t wanted   = std::max<int64_t>(1, most);
        sources[0].split_keys  = std::max<int64_t>(1, turbo_ceil(tiles, wanted))*TURBO_KEYS;
        sources[0].n_splits    = std::max<int64_t>(1, turbo_ceil(n_kv, sources[0].split_keys));
        n_parts = 0;
        for (const turbo_attention_source & source : sources) {
            n_parts += source.n_splits;
        }
        const int64_t row_bytes = n_parts*n_streams*n_kv_heads*(size_v + 2)*sizeof(float);
        at_once = std::min(n_queries, std::max<int64_t>(1, TURBO_PARTS_BYTES/(row_bytes*group)));
        parts_bytes = row_bytes*padded_rows(at_once);
    }

    int64_t padded_rows(int64_t queries) const { // of a head of keys
        return turbo_ceil(queries*group, rows_at_once)*rows_at_once;
    }
};

static void turbo_encode_attention(ggml_metal_device_t device, ggml_metal_encoder_t encoder, const ggml_tensor * op) {
    const turbo_attention_plan plan(op);
    const bool has_window = turbo_is_window_attention(op);
    const ggml_tensor * q = op->src[0], * sinks = op->src[4];
    const ggml_tensor * window  = has_window ? op->src[TURBO_WINDOW_MASK_W] : nullptr;
    const ggml_tensor * columns = has_window ? op->src[TURBO_WINDOW_COLUMNS] : nullptr;
    float factors[3];
    memcpy(factors, has_window ? (const void *) turbo_window_params(op) : op->op_params, sizeof(factors));
    const float scale = factors[0], max_bias = factors[1], softcap = factors[2];
    const ggml_metal_buffer_id parts = turbo_scratch(device, plan.parts_bytes), of_q = turbo_buffer(q);
    const std::string m = std::to_string(plan.rows_at_once/8), c = std::to_string(plan.size_v/64);
    const std::string kernel = "turbo_attention_m" + m + "_c" + c;

    for (int64_t first = 0; first < plan.n_queries; first += plan.at_once) {
        const int64_t n_now = std::min(plan.at_once, plan.n_queries - first), padded_rows = plan.padded_rows(n_now);
        ggml_metal_encoder_memory_barrier(encoder); // the parts that were there, maybe another node's, have been read
        int64_t first_part = 0;
        for (const turbo_attention_source & source : plan.sources) {
            const ggml_tensor * k = source.k, * v = source.v, * mask = source.mask;
            turbo_attention_args args = {};
            args.first_query = (uint32_t) first, args.n_queries = (uint32_t) n_now, args.n_keys = (uint32_t) k->ne[1];
            args.n_heads = (uint32_t) plan.n_heads, args.group = (uint32_t) plan.group;
            args.n_streams   = (uint32_t) plan.n_streams;
            args.padded_rows = (uint32_t) padded_rows;
            args.first_part  = (uint32_t) first_part;
            args.n_splits = (uint32_t) source.n_splits, args.split_keys = (uint32_t) source.split_keys;
            args.q_query = q->nb[1], args.q_head = q->nb[2], args.q_stream = q->nb[3];
            args.k_key = k->nb[1], args.k_head = k->nb[2], args.k_stream = k->nb[3];
            args.v_key = v->nb[1], args.v_head = v->nb[2], args.v_stream = v->nb[3];
            args.mask_heads = args.mask_streams = 1;
            if (mask) {
                args.mask_heads = (uint32_t) mask->ne[2], args.mask_streams = (uint32_t) mask->ne[3];
                args.mask_query = mask->nb[1], args.mask_head = mask->nb[2], args.mask_stream = mask->nb[3];
            }
            if (has_window) {
                args.window_query = window->nb[1], args.window_stream = window->nb[3];
                args.columns_stream = columns->nb[3];
                args.first_tile = source.first_tile;
            }
            args.scale = scale, args.softcap = softcap, args.max_bias = max_bias;
            turbo_dispatch(
                encoder,
                turbo_pipeline(device, kernel, {
                    { TURBO_CONSTANT_TYPE, turbo_number(k->type) }, { TURBO_CONSTANT_TYPE_V, turbo_number(v->type) },
                    { TURBO_CONSTANT_SIZE_K, (int) k->ne[0] }, { TURBO_CONSTANT_FLAGS, (int) source.flags },
                }),
                args,
                { of_q, turbo_buffer(source.k_memory), turbo_buffer(source.v_memory, source.v_offset),
                  mask ? turbo_buffer(mask, source.mask_offset) : of_q, window ? turbo_buffer(window) : of_q,
                  columns ? turbo_buffer(columns) : of_q, parts },
                turbo_attention_bytes(plan.rows_at_once),
                { padded_rows/plan.rows_at_once, plan.n_kv_heads, plan.n_streams*source.n_splits }, 128);
            first_part += source.n_splits;
        }
        ggml_metal_encoder_memory_barrier(encoder);
        turbo_combine_args args = {};
        args.n_parts = (uint32_t) plan.n_parts, args.size_v = (uint32_t) plan.size_v;
        args.group   = (uint32_t) plan.group;
        args.n_streams = (uint32_t) plan.n_streams, args.n_kv_heads = (uint32_t) plan.n_kv_heads;
        args.padded_rows = (uint32_t) padded_rows;
        args.first_query = (uint32_t) first, args.all_queries = (uint32_t) plan.n_queries;
        args.has_sinks   = sinks != nullptr;
        turbo_dispatch(
            encoder, turbo_pipeline(device, "turbo_combine", {}), args,
            { parts, sinks ? turbo_buffer(sinks) : parts, turbo_buffer(op) }, 0,
            { plan.n_heads, n_now, plan.n_streams }, 64);
    }
}

// ---- what llama.cpp's code calls ----

static bool turbo_takes_any(const ggml_tensor *) {
    return true;
}

struct turbo_operator {
    ggml_op op;
    bool (*takes)(const ggml_tensor * op);
    // null: there is nothing to do
    void (*encode)(ggml_metal_device_t device, ggml_metal_encoder_t encoder, const ggml_tensor * op);
};

// Everything that devices do with our types. A node is computed by the first line that takes it; of nodes with our
// types no others are taken.
static const turbo_operator turbo_operators[] = {
    { GGML_OP_SET_ROWS,       turbo_takes_set_rows,   turbo_encode_set_rows },
    { GGML_OP_GET_ROWS,       turbo_takes_get_rows,   turbo_encode_get_rows },
    { GGML_OP_CPY,            turbo_takes_encoding,   turbo_encode_encoding },
    { GGML_OP_CPY,            turbo_takes_decoding,   turbo_encode_decoding },
    { GGML_OP_CPY,            turbo_takes_copy,       turbo_encode_copy },
    { GGML_OP_DUP,            turbo_takes_copy,       turbo_encode_copy },
    { GGML_OP_CONT,           turbo_takes_copy,       turbo_encode_copy },
    { GGML_OP_FLASH_ATTN_EXT, turbo_takes_attention,  turbo_encode_attention },
    { GGML_OP_CUSTOM,         turbo_takes_window,     turbo_encode_attention },
    { GGML_OP_MUL_MAT,        turbo_takes_mul_mat,    turbo_encode_mul_mat },
    { GGML_OP_MUL_MAT_ID,     turbo_takes_mul_mat_id, turbo_encode_mul_mat },
    { GGML_OP_NONE,           turbo_takes_any,        nullptr },
    { GGML_OP_RESHAPE,        turbo_takes_any,        nullptr },
    { GGML_OP_VIEW,           turbo_takes_any,        nullptr },
    { GGML_OP_PERMUTE,        turbo_takes_any,        nullptr },
    { GGML_OP_TRANSPOSE,      turbo_takes_any,        nullptr },
};

bool ggml_metal_turbo_is_ours(const ggml_tensor * op) {
    bool ours = turbo_is_type(op->type) || turbo_is_window_attention(op);
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        ours = ours || (op->src[i] && turbo_is_type(op->src[i]->type));
    }
    return ours;
}

static const turbo_operator * turbo_find_operator(const ggml_tensor * op) {
    for (const turbo_operator & o : turbo_operators) {
        if (o.op == op->op && o.takes(op)) {
            return &o;
        }
    }
    return nullptr;
}

// What a device lacks for the kernels; null if it has all. The log says it once.
static const char * turbo_missing(ggml_metal_device_t device) {
    const ggml_metal_device_props * props = ggml_metal_device_get_props(device);
    const bool   has_simd = props->has_simdgroup_mm && props->has_simdgroup_reduction;
    const char * missing  = !has_simd                                        ? "matrices of SIMD groups (Apple7)"
                          : props->max_theadgroup_memory_size < TURBO_MOST_BYTES ? "16 KiB of threadgroup memory"
                          : !turbo_library(device)             ? "compiler that takes our kernels, see above" : nullptr;
    static std::once_flag said;
    if (missing) {
        std::call_once(said, [&] {
            GGML_LOG_WARN("ggml_metal: turbo cache types are not computed on %s: it has no %s\n", props->name, missing);
        });
    }
    return missing;
}

int ggml_metal_turbo_supports(ggml_metal_device_t device, const ggml_tensor * op) {
    if (!ggml_metal_turbo_is_ours(op)) {
        return -1;
    }
    const turbo_operator * o = turbo_find_operator(op);
    return o && (!o->encode || !turbo_missing(device));
}

bool ggml_metal_turbo_encode(ggml_metal_device_t device, ggml_metal_encoder_t encoder, const ggml_tensor * op) {
    const turbo_operator * o = ggml_metal_turbo_is_ours(op) ? turbo_find_operator(op) : nullptr;
    if (!o || !o->encode) {
        return false;
    }
    o->encode(device, encoder, op);
    return true;
}
