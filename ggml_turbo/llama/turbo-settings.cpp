#include "llama/turbo-settings.h"

#include "llama-impl.h"

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>

static const int32_t SINKS = 4;

static const llama_turbo_params NOTHING = { LLAMA_TURBO_UNSAID, LLAMA_TURBO_UNSAID, LLAMA_TURBO_UNSAID };

static std::mutex         options_mutex;
static llama_turbo_params options[2] = { NOTHING, NOTHING }; // of contexts, of drafts

static thread_local llama_turbo_params next  = NOTHING;
static thread_local llama_turbo_params taken = NOTHING;
static thread_local bool               draft = false;

llama_turbo_params llama_turbo_default_params(void) {
    return NOTHING;
}

static bool is_possible(const llama_turbo_params & params) {
    const char * wrong =
        params.cache_window < LLAMA_TURBO_UNSAID ? "the recent window is no number of tokens" :
        params.cache_sinks  < LLAMA_TURBO_UNSAID ? "the first tokens of the recent window are no number of tokens" :
        params.calibration  < LLAMA_TURBO_UNSAID    ? "the use of the calibration is unknown" :
        params.calibration  > LLAMA_TURBO_USE_FORCE ? "the use of the calibration is unknown" :
        nullptr;
    if (wrong) {
        LLAMA_LOG_ERROR("%s: %s (%d, %d, %d)\n", __func__, wrong, params.cache_window, params.cache_sinks,
            params.calibration);
    }
    return !wrong;
}

bool llama_turbo_set_next(const llama_turbo_params * params) {
    if (!is_possible(*params)) {
        return false;
    }
    next = *params;
    return true;
}

bool llama_turbo_set_options(const llama_turbo_params * params, bool draft) {
    if (!is_possible(*params)) {
        return false;
    }
    std::lock_guard<std::mutex> lock(options_mutex);
    options[draft] = *params;
    return true;
}

// The value of a variable; of its old name, with one line in the log, where it has no new one. Empty: it is not set.
static std::string variable(const char * name, const char * old_name) {
    if (const char * value = getenv(name); value && *value) {
        return value;
    }
    const char * value = getenv(old_name);
    if (!value || !*value) {
        return "";
    }
    static std::mutex mutex;
    static std::set<std::string> warned;
    std::lock_guard<std::mutex> lock(mutex);
    if (warned.insert(old_name).second) {
        LLAMA_LOG_WARN("%s: %s is called %s now; the next release will not know the old name\n", __func__, old_name,
            name);
    }
    return value;
}

static int32_t number_of_tokens(const char * name, const char * old_name) {
    const std::string text = variable(name, old_name);
    if (text.empty()) {
        return LLAMA_TURBO_UNSAID;
    }
    const int32_t tokens = llama_turbo_number_of_tokens(text);
    if (tokens == LLAMA_TURBO_UNSAID) {
        throw std::runtime_error(format("%s is '%s', which is not a number of tokens", name, text.c_str()));
    }
    return tokens;
}

static int32_t use_of_calibration(const char * name, const char * old_name) {
    const std::string text = variable(name, old_name);
    const std::string known[] = { "0", "1", "force" }; // in the order of llama_turbo_use
    for (int32_t use = 0; use < 3; ++use) {
        if (text == known[use]) {
            return use;
        }
    }
    if (!text.empty()) {
        throw std::runtime_error(format("%s is '%s', and not 0, 1 or force", name, text.c_str()));
    }
    return LLAMA_TURBO_UNSAID;
}

static void fill(int32_t & value, int32_t otherwise) {
    if (value == LLAMA_TURBO_UNSAID) {
        value = otherwise;
    }
}

static void fill(llama_turbo_params & params, const llama_turbo_params & otherwise) {
    fill(params.cache_window, otherwise.cache_window);
    fill(params.cache_sinks,  otherwise.cache_sinks);
    fill(params.calibration,  otherwise.calibration);
}

void llama_turbo_take_params(bool is_draft) {
    taken = next;
    next  = NOTHING;
    draft = is_draft;
    {
        std::lock_guard<std::mutex> lock(options_mutex);
        if (is_draft) {
            fill(taken, options[true]);
        }
        fill(taken, options[false]);
    }
    fill(taken, {
        number_of_tokens("TURBO_CACHE_WINDOW", "LLAMA_ARG_CACHE_WINDOW"),
        number_of_tokens("TURBO_CACHE_SINKS", "LLAMA_ARG_CACHE_SINKS"),
        use_of_calibration("TURBO_CALIBRATION", "LLAMA_TURBO_CALIBRATION"),
    });
    fill(taken, { LLAMA_TURBO_UNSAID, SINKS, LLAMA_TURBO_USE_FIT });
}

const llama_turbo_params & llama_turbo_taken_params() {
    return taken;
}

bool llama_turbo_is_draft() {
    return draft;
}
