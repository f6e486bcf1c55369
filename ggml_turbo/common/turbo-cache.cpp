#include "common/turbo-cache.h"

#include "llama/turbo-cache-facts.h"
#include "log.h"

#include <mutex>
#include <optional>

static std::mutex                             mutex;
static std::optional<llama_turbo_cache_facts> last;

static double bits(ggml_type type) {
    return 8.0*ggml_type_size(type)/ggml_blck_size(type);
}

static void tell(const llama_turbo_cache_facts * facts) {
    const double mib = facts->bytes/1024.0/1024.0;
    LOG_INF("KV cache%s: keys in %s (%g bits), values in %s (%g bits), %u layers of %u tokens, %.2f MiB each, %.2f MiB in all\n",
        facts->draft ? " of the draft" : "", ggml_type_name(facts->type_k), bits(facts->type_k), ggml_type_name(facts->type_v),
        bits(facts->type_v), facts->layers, facts->cells, mib/facts->layers, mib);
    if (facts->window) {
        LOG_INF("KV cache%s: the last %u tokens and the first %u of each sequence in f16 beside it\n",
            facts->draft ? " of the draft" : "", facts->window, facts->sinks);
    }
    if (!facts->draft) {
        std::lock_guard<std::mutex> lock(mutex);
        last = *facts;
    }
}

void llama_turbo_log_caches() {
    llama_turbo_set_cache_listener(tell);
}

common_json llama_turbo_cache_json() {
    std::lock_guard<std::mutex> lock(mutex);
    if (!last) {
        return nullptr;
    }
    return common_json {
        { "type_k", ggml_type_name(last->type_k) },
        { "type_v", ggml_type_name(last->type_v) },
        { "bits_k", bits(last->type_k) },
        { "bits_v", bits(last->type_v) },
        { "recent_window", last->window },
        { "sinks", last->sinks },
    };
}
