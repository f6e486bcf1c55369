// The options of llama.cpp's programs for what llama/turbo-settings.h says of contexts.

#include "arg.h"

#include "common/turbo-cache.h"
#include "llama/turbo-settings.h"

#include <stdexcept>
#include <string>

static int32_t number_of_tokens(const std::string & text) {
    const int32_t tokens = llama_turbo_number_of_tokens(text);
    if (tokens == LLAMA_TURBO_UNSAID) {
        throw std::invalid_argument("'" + text + "' is not a number of tokens");
    }
    return tokens;
}

static const std::initializer_list<llama_example> WITH_DRAFTS = {
    LLAMA_EXAMPLE_SPECULATIVE, LLAMA_EXAMPLE_SERVER, LLAMA_EXAMPLE_CLI
};

// What the command line has said so far.
static llama_turbo_params options       = llama_turbo_default_params();
static llama_turbo_params draft_options = llama_turbo_default_params();

void llama_turbo_add_options(const std::function<void(common_arg)> & add_opt) {
    llama_turbo_log_caches();
    add_opt(common_arg(
        {"--cache-window"}, "N",
        "tokens at the end of each sequence that are kept at full precision beside a quantized KV cache "
        "(default: with turbo types a 64th of the context, between 64 and 1024; 0 with others)",
        [](common_params &, const std::string & value) {
            options.cache_window = number_of_tokens(value);
            llama_turbo_set_options(&options, false);
        }
    ).set_env("TURBO_CACHE_WINDOW"));
    add_opt(common_arg(
        {"--cache-sinks"}, "N",
        "tokens at the beginning of each sequence that are kept as well, where there is a --cache-window (default: 4)",
        [](common_params &, const std::string & value) {
            options.cache_sinks = number_of_tokens(value);
            llama_turbo_set_options(&options, false);
        }
    ).set_env("TURBO_CACHE_SINKS"));
    add_opt(common_arg(
        {"--spec-draft-cache-window", "--cache-window-draft"}, "N",
        "--cache-window of the draft model (default: the same)",
        [](common_params &, const std::string & value) {
            draft_options.cache_window = number_of_tokens(value);
            llama_turbo_set_options(&draft_options, true);
        }
    ).set_spec().set_examples(WITH_DRAFTS).set_env("TURBO_DRAFT_CACHE_WINDOW"));
    add_opt(common_arg(
        {"--spec-draft-cache-sinks", "--cache-sinks-draft"}, "N",
        "--cache-sinks of the draft model (default: the same)",
        [](common_params &, const std::string & value) {
            draft_options.cache_sinks = number_of_tokens(value);
            llama_turbo_set_options(&draft_options, true);
        }
    ).set_spec().set_examples(WITH_DRAFTS).set_env("TURBO_DRAFT_CACHE_SINKS"));
}
