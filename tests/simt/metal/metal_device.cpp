// ggml-metal-device.h and ggml-metal-context.h without Metal, so that llama.cpp's own Metal back end runs with kernels
// in the emulator: buffers are host memory between guard pages, an encoder runs a kernel when it is dispatched.

#include "metal.h"

#include "ggml-backend-impl.h"
#include "ggml-impl.h"
#include "ggml-metal-common.h"
#include "ggml-metal-context.h"
#include "ggml-metal-device.h"
#include "ggml-metal-fusion.h"
#include "ggml-metal-impl.h"
#include "ggml-metal-ops.h"
#include "metal/turbo-metal.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

// ---- kernels ----

namespace simt_metal {

static library * libraries;

library::library(const char * name) : name(name), next(libraries) {
    libraries = this;
}

const library * find(const char * kernel, entry & run) {
    for (const library * l = libraries; l; l = l->next) {
        for (const kernel_info * k = l->kernels; k; k = k->next) {
            if (strcmp(k->name, kernel) == 0) {
                run = k->run;
                return l;
            }
        }
    }
    return nullptr;
}

static const size_t most_threadgroup_memory = 32*1024;
alignas(128) static thread_local uint8_t memory_of_threadgroup[most_threadgroup_memory];
static simt::dynamic_shared registered(memory_of_threadgroup, most_threadgroup_memory);

void * threadgroup_memory() {
    return memory_of_threadgroup;
}

uint64_t matrix_products;

} // namespace simt_metal

struct constant_value {
    int     index;
    int64_t value;
};
struct ggml_metal_cv {
    std::vector<constant_value> values;
};
struct ggml_metal_pipeline {
    std::string                 base, name;
    simt_metal::entry           run;
    const simt_metal::library * library;
    std::vector<constant_value> values;
};
struct ggml_metal_library {
    ggml_metal_device_t                                         device;
    std::map<std::string, std::unique_ptr<ggml_metal_pipeline>> pipelines;
};
struct ggml_metal_device {
    ggml_metal_device_props  props;
    ggml_metal_library       library;
    ggml_metal_fusion_info * fusions;
};
struct ggml_metal_encoder {
    ggml_metal_pipeline_t          pipeline;
    simt_metal::dispatch           dispatch;
    std::vector<std::vector<char>> bytes;
    size_t                         shared;
    bool                           concurrent, is_first; // since the last barrier
};
struct ggml_metal_buffer {
    std::unique_ptr<simt::memory> memory; // null: of somebody else's
    void *                        base;
    size_t                        size;
    bool                          shared;
};
struct ggml_metal_event {
    int unused;
};
struct ggml_metal {
    ggml_metal_device_t device;
    ggml_metal_event    event;
};

static std::mutex                    one_at_a_time; // the emulator has one device
static std::map<std::string, int>    dispatches;
static std::map<std::string, size_t> threadgroup_bytes;

// How often a kernel was dispatched so far, and the most threadgroup memory that the host asked for.
extern "C" int simt_dispatches(const char * kernel) {
    return dispatches[kernel];
}
extern "C" size_t simt_threadgroup_bytes(const char * kernel) {
    return threadgroup_bytes[kernel];
}

// What all kernels did so far: accesses, where they are checked, by their bytes, and products of matrices.
extern "C" uint64_t simt_array_reads(int bytes)   { return simt::counted.array_reads[bytes]; }
extern "C" uint64_t simt_shared_reads(int bytes)  { return simt::counted.shared_reads[bytes]; }
extern "C" uint64_t simt_shared_writes(int bytes) { return simt::counted.shared_writes[bytes]; }
extern "C" uint64_t simt_matrix_products(void)    { return simt_metal::matrix_products; }

extern "C" {

ggml_metal_cv_t ggml_metal_cv_init(void) { return new ggml_metal_cv; }
void ggml_metal_cv_free(ggml_metal_cv_t cv) { delete cv; }
void ggml_metal_cv_set_int16(ggml_metal_cv_t cv, int16_t value, int32_t i) { cv->values.push_back({ i, value }); }
void ggml_metal_cv_set_int32(ggml_metal_cv_t cv, int32_t value, int32_t i) { cv->values.push_back({ i, value }); }
void ggml_metal_cv_set_bool(ggml_metal_cv_t cv, bool value, int32_t i)     { cv->values.push_back({ i, value }); }

ggml_metal_pipeline_t ggml_metal_pipeline_init(void) { return new ggml_metal_pipeline; }
void ggml_metal_pipeline_free(ggml_metal_pipeline_t p) { delete p; }
int ggml_metal_pipeline_max_theads_per_threadgroup(ggml_metal_pipeline_with_params) { return 1024; }

ggml_metal_library_t ggml_metal_library_init(ggml_metal_device_t device) { return &device->library; }
// What the source says was compiled before; it is one of those that are linked here.
ggml_metal_library_t ggml_metal_library_init_from_source(ggml_metal_device_t device, const char *, bool) {
    return getenv("SIMT_METAL_NO_COMPILER") ? nullptr : new ggml_metal_library{ device, {} };
}
void ggml_metal_library_free(ggml_metal_library_t l) { delete l; }
ggml_metal_device_t ggml_metal_library_get_device(ggml_metal_library_t l) { return l->device; }

ggml_metal_pipeline_with_params ggml_metal_library_get_pipeline(ggml_metal_library_t l, const char * name) {
    ggml_metal_pipeline_with_params found = {};
    const auto at = l->pipelines.find(name);
    found.pipeline = at == l->pipelines.end() ? nullptr : at->second.get();
    return found;
}

ggml_metal_pipeline_with_params ggml_metal_library_compile_pipeline(
        ggml_metal_library_t l, const char * base, const char * name, ggml_metal_cv_t cv) {
    ggml_metal_pipeline_with_params found = ggml_metal_library_get_pipeline(l, name);
    if (found.pipeline) {
        return found;
    }
    simt_metal::entry run;
    const simt_metal::library * from = simt_metal::find(base, run);
    if (!from) {
        GGML_LOG_ERROR("simt: there is no kernel %s (%s)\n", base, name);
        return found;
    }
    auto & made = l->pipelines[name];
    made.reset(new ggml_metal_pipeline{ base, name, run, from, cv ? cv->values : std::vector<constant_value>() });
    found.pipeline = made.get();
    return found;
}

// ---- the encoder ----

ggml_metal_encoder_t ggml_metal_encoder_init(ggml_metal_cmd_buf_t, bool concurrent) {
    auto * e = new ggml_metal_encoder{};
    e->bytes.resize(31);
    e->concurrent = concurrent;
    e->is_first   = true;
    return e;
}
void ggml_metal_encoder_free(ggml_metal_encoder_t e) { delete e; }
void ggml_metal_encoder_debug_group_push(ggml_metal_encoder_t, const char *) {}
void ggml_metal_encoder_debug_group_pop(ggml_metal_encoder_t) {}
void ggml_metal_encoder_set_pipeline(ggml_metal_encoder_t e, ggml_metal_pipeline_with_params p) {
    if (!p.pipeline) {
        GGML_ABORT("simt: a pipeline is missing, see above");
    }
    e->pipeline = p.pipeline;
}
void ggml_metal_encoder_set_bytes(ggml_metal_encoder_t e, void * data, size_t size, int i) {
    e->bytes[i].assign((char *) data, (char *) data + size);
    e->dispatch.buffer[i] = e->bytes[i].data();
}
void ggml_metal_encoder_set_buffer(ggml_metal_encoder_t e, ggml_metal_buffer_id b, int i) {
    e->dispatch.buffer[i] = b.metal ? (char *) ((ggml_metal_buffer_t) b.metal)->base + b.offs : nullptr;
}
void ggml_metal_encoder_set_threadgroup_memory_size(ggml_metal_encoder_t e, size_t size, int i) {
    if (size % 16 != 0 || size > simt_metal::most_threadgroup_memory || i != 0) {
        GGML_ABORT("simt: %s: %zu bytes of threadgroup memory at index %d", e->pipeline->name.c_str(), size, i);
    }
    e->shared = size;
}
void ggml_metal_encoder_dispatch_threadgroups(ggml_metal_encoder_t e, int g0, int g1, int g2, int t0, int t1, int t2) {
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    for (auto * c = e->pipeline->library->constants; c; c = c->next) {
        memset(c->value, 0, c->size);
        for (const constant_value & v : e->pipeline->values) {
            if (v.index == c->index) {
                memcpy(c->value, &v.value, c->size);
            }
        }
    }
    static unsigned seed;
    ++seed;
    simt::set_schedule(simt::schedules[seed % 3], seed);
    const simt_metal::entry run = e->pipeline->run;
    const simt::dim3 grid((unsigned) g0, (unsigned) g1, (unsigned) g2);
    const simt::dim3 block((unsigned) t0, (unsigned) t1, (unsigned) t2);
    simt::launch(grid, block, e->shared, [=] { run(e->dispatch); }, !e->concurrent || e->is_first);
    size_t & most = threadgroup_bytes[e->pipeline->base];
    most = most < e->shared ? e->shared : most;
    ++dispatches[e->pipeline->base];
    e->is_first = false;
    e->shared   = 0;
}
void ggml_metal_encoder_memory_barrier(ggml_metal_encoder_t e) { e->is_first = true; }
void ggml_metal_encoder_end_encoding(ggml_metal_encoder_t) {}

// ---- the device: one like an M1 ----

ggml_metal_rsets_t ggml_metal_rsets_init(ggml_metal_device_t) { return nullptr; }
void ggml_metal_rsets_free(ggml_metal_rsets_t) {}
const char * ggml_metal_device_id_token(ggml_metal_device_id) { return "generic"; }
ggml_metal_device_t ggml_metal_device_init(int number, int) {
    auto * d = new ggml_metal_device();
    auto & p = d->props;
    p.device = number;
    snprintf(p.name, sizeof(p.name), "MTL%d", number);
    snprintf(p.desc, sizeof(p.desc), "Metal kernels in the emulator");
    p.max_buffer_size = p.max_working_set_size = (size_t) 8 << 30;
    p.max_theadgroup_memory_size = simt_metal::most_threadgroup_memory;
    p.has_simdgroup_mm        = !getenv("SIMT_METAL_OLD"); // as before M1
    p.has_simdgroup_reduction = p.has_unified_memory = p.supports_gpu_family_apple7 = true;
    p.use_shared_buffers        = true;
    p.gpu_family                = 7;
    p.op_offload_min_batch_size = 1 << 30;
    d->library.device = d;
    d->fusions = ggml_metal_fusion_info_init(getenv("GGML_METAL_FUSION_DISABLE") == nullptr, 0);
    return d;
}
void ggml_metal_device_free(ggml_metal_device_t d) { delete d; }
void * ggml_metal_device_get_obj(ggml_metal_device_t d) { return d; }
void * ggml_metal_device_get_queue(ggml_metal_device_t d) { return d; }
ggml_metal_library_t ggml_metal_device_get_library(ggml_metal_device_t d) { return &d->library; }
void ggml_metal_device_rsets_add(ggml_metal_device_t, ggml_metal_rset_t) {}
void ggml_metal_device_rsets_rm(ggml_metal_device_t, ggml_metal_rset_t) {}
void ggml_metal_device_rsets_keep_alive(ggml_metal_device_t) {}
void ggml_metal_event_encode_signal(ggml_metal_event_t, ggml_metal_cmd_buf_t) {}
void ggml_metal_event_encode_wait(ggml_metal_event_t, ggml_metal_cmd_buf_t) {}
ggml_metal_event_t ggml_metal_device_event_init(ggml_metal_device_t) { return new ggml_metal_event(); }
void ggml_metal_device_event_free(ggml_metal_device_t, ggml_metal_event_t e) { delete e; }
void ggml_metal_device_event_synchronize(ggml_metal_device_t, ggml_metal_event_t) {}
void ggml_metal_device_get_memory(ggml_metal_device_t d, size_t * free, size_t * total) {
    *free = *total = d->props.max_working_set_size;
}
const ggml_metal_device_props * ggml_metal_device_get_props(ggml_metal_device_t d) { return &d->props; }
ggml_metal_fusion_info * ggml_metal_device_get_fusion_info(ggml_metal_device_t d) { return d->fusions; }

// ---- buffers ----

ggml_metal_buffer_t ggml_metal_buffer_init(ggml_metal_device_t, size_t size, bool shared) {
    auto memory = std::make_unique<simt::memory>(size, 32, true, "array");
    void * base = memory->data();
    return new ggml_metal_buffer{ std::move(memory), base, size, shared };
}
ggml_metal_buffer_t ggml_metal_buffer_map(ggml_metal_device_t, void * p, size_t size, size_t) {
    return new ggml_metal_buffer{ nullptr, p, size, true };
}
void ggml_metal_buffer_free(ggml_metal_buffer_t b) { delete b; }
void * ggml_metal_buffer_get_base(ggml_metal_buffer_t b) { return b->base; }
bool ggml_metal_buffer_is_shared(ggml_metal_buffer_t b) { return b->shared; }
static void written(ggml_metal_buffer_t b, const void * at, size_t n) {
    if (b->memory) {
        b->memory->written((size_t) ((const char *) at - (const char *) b->base), n);
    }
}
void ggml_metal_buffer_memset_tensor(ggml_metal_buffer_t b, ggml_tensor * t, uint8_t value, size_t offset, size_t n) {
    memset((char *) t->data + offset, value, n);
    written(b, (char *) t->data + offset, n);
}
void ggml_metal_buffer_set_tensor(ggml_metal_buffer_t b, ggml_tensor * t, const void * data, size_t offset, size_t n) {
    memcpy((char *) t->data + offset, data, n);
    written(b, (char *) t->data + offset, n);
}
void ggml_metal_buffer_get_tensor(ggml_metal_buffer_t, const ggml_tensor * t, void * data, size_t offset, size_t n) {
    memcpy(data, (const char *) t->data + offset, n);
}
bool ggml_metal_buffer_cpy_tensor(ggml_metal_buffer_t, const ggml_tensor *, ggml_tensor *) { return false; }
void ggml_metal_buffer_clear(ggml_metal_buffer_t b, uint8_t value) {
    memset(b->base, value, b->size);
    written(b, b->base, b->size);
}
ggml_metal_buffer_id ggml_metal_buffer_get_id(ggml_metal_buffer_t b, const ggml_tensor * t) {
    return { b, (size_t) ((char *) t->data - (char *) b->base) };
}

// ---- the back end ----

static ggml_metal_buffer_t buffer_of(const ggml_tensor * t) {
    return (ggml_metal_buffer_t) (t->view_src ? t->view_src : t)->buffer->context;
}
ggml_metal_t ggml_metal_init(ggml_metal_device_t device) { return new ggml_metal{ device, {} }; }
void ggml_metal_free(ggml_metal_t m) { delete m; }
const char * ggml_metal_get_name(ggml_metal_t m) { return m->device->props.name; }
void ggml_metal_synchronize(ggml_metal_t) {}
void ggml_metal_set_tensor_async(ggml_metal_t, ggml_tensor * t, const void * data, size_t offset, size_t n) {
    ggml_metal_buffer_set_tensor(buffer_of(t), t, data, offset, n);
}
void ggml_metal_get_tensor_async(ggml_metal_t, const ggml_tensor * t, void * data, size_t offset, size_t n) {
    ggml_metal_buffer_get_tensor(buffer_of(t), t, data, offset, n);
}
bool ggml_metal_cpy_tensor_async(ggml_metal_t, ggml_metal_t, const ggml_tensor *, ggml_tensor *) { return false; }
ggml_status ggml_metal_graph_compute(ggml_metal_t m, ggml_cgraph * graph) {
    const int n = graph->n_nodes;
    ggml_metal_op_t op = ggml_metal_op_init(m->device, nullptr, graph, m->device->fusions, 0, n, true, false, 0);
    for (int i = 0; i < ggml_metal_op_n_nodes(op);) {
        i += ggml_metal_op_encode(op, i);
    }
    ggml_metal_op_free(op);
    return GGML_STATUS_SUCCESS;
}
void ggml_metal_graph_optimize(ggml_metal_t, ggml_cgraph *) {}
void ggml_metal_event_record(ggml_metal_t, ggml_metal_event_t) {}
void ggml_metal_event_wait(ggml_metal_t, ggml_metal_event_t) {}
ggml_metal_event_t ggml_metal_get_ev_cpy(ggml_metal_t m) { return &m->event; }
void ggml_metal_set_n_cb(ggml_metal_t, int) {}
void ggml_metal_set_abort_callback(ggml_metal_t, ggml_abort_callback, void *) {}
bool ggml_metal_supports_family(ggml_metal_t, int) { return true; }
void ggml_metal_capture_next_compute(ggml_metal_t) {}

} // extern "C"

// What the back end takes: cut out of ggml-metal-device.m, where it is C.
#define ggml_metal_device_supports_op supports_op
#include "supports-op.inc"
#undef ggml_metal_device_supports_op

// SIMT_METAL_ONLY_OURS: nodes with types of ours, our operators, and writing to the ring of a recent window. Of models
// that has the device compute what we want, and nobody has to compile all of llama.cpp's kernels.
extern "C" bool ggml_metal_device_supports_op(ggml_metal_device_t device, const ggml_tensor * op) {
    static const bool only_ours = getenv("SIMT_METAL_ONLY_OURS") != nullptr;
    const bool        is_stock  = op->op == GGML_OP_SET_ROWS || ggml_op_is_empty(op->op);
    const bool        is_ours   = is_stock || ggml_metal_turbo_is_ours(op);
    return (!only_ours || is_ours) && supports_op(device, op);
}
