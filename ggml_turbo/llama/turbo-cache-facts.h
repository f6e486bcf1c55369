#pragma once

// What the KV cache of a context became, for programs that tell it: their log and llama-server's answers. Plain C.

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

// One cache; a context with sliding windows has two, a hybrid one for those of its layers that have attention.
struct llama_turbo_cache_facts {
    enum ggml_type type_k, type_v;
    uint32_t       layers; // with keys of their own
    uint32_t       cells;  // tokens that each holds
    uint64_t       bytes;  // of keys and values, the recent window's not among them
    uint32_t       window; // tokens at the end of each sequence that the recent window keeps; 0: there is none
    uint32_t       sinks;  // tokens at its beginning that it keeps as well
    bool           draft;  // of a draft model, or another context made beside one
};

typedef void (*llama_turbo_cache_listener)(const struct llama_turbo_cache_facts * facts);

// Called for each cache that is made, on the thread that makes it. One for the process; null: nobody is called.
LLAMA_API void llama_turbo_set_cache_listener(llama_turbo_cache_listener listener);

#ifdef __cplusplus
}

void llama_turbo_tell(const llama_turbo_cache_facts & facts);
#endif
