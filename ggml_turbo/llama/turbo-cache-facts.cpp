#include "turbo-cache-facts.h"

#include <atomic>

static std::atomic<llama_turbo_cache_listener> listening { nullptr };

void llama_turbo_set_cache_listener(llama_turbo_cache_listener listener) {
    listening = listener;
}

void llama_turbo_tell(const llama_turbo_cache_facts & facts) {
    if (const llama_turbo_cache_listener listener = listening) {
        listener(&facts);
    }
}
