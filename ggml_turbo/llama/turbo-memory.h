#pragma once

// What a model and a context of it take in memory, as llama.cpp itself counts it, without reading weights or
// allocating a cache. Plain C, for the Python package (python/turboquant_gguf/llamacpp/modelmemory.py).

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

struct turbo_memory; // an opened model

// Bytes.
struct turbo_memory_size {
    uint64_t weights;
    uint64_t cache;   // all that the context keeps: keys, values and recurrent states
    uint64_t compute; // intermediate results
};

// One layer's attention. A layer of no key-value heads has none.
struct turbo_memory_layer {
    uint32_t n_head;
    uint32_t n_head_kv;
    uint32_t head_size_k;
    uint32_t head_size_v;
    uint32_t n_window; // the sliding window it sees, in tokens; 0: all of the context
    bool     shares;   // it reads the keys and values of another layer
};

// The model in a file (of split files the first); NULL if llama.cpp cannot load it.
LLAMA_API struct turbo_memory * turbo_memory_open (const char * path);
LLAMA_API void                  turbo_memory_close(struct turbo_memory * memory);

LLAMA_API uint32_t                  turbo_memory_n_layer  (const struct turbo_memory * memory);
LLAMA_API struct turbo_memory_layer turbo_memory_get_layer(const struct turbo_memory * memory, uint32_t il);

// The size of a context such as llama-server makes for one sequence, with flash attention, on the CPU back end.
// type_k, type_v: enum ggml_type. False if llama.cpp refuses to make it.
LLAMA_API bool turbo_memory_measure(struct turbo_memory * memory, int type_k, int type_v, uint32_t n_ctx, uint32_t n_ubatch,
        struct turbo_memory_size * size);

// What llama.cpp logged as errors during this thread's last turbo_memory_open or turbo_memory_measure, the cause first.
LLAMA_API const char * turbo_memory_errors(void);

#ifdef __cplusplus
}
#endif
