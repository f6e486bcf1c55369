#pragma once

// What a context does beside a quantized cache: the recent window and the calibration of its keys. Plain C.
//
// Each setting is taken from the first of these that says it:
//   llama_turbo_set_next     for the next context that the calling thread makes
//   llama_turbo_set_options  for all contexts of the process: --cache-window and --cache-sinks of llama.cpp's programs
//   the environment          TURBO_CACHE_WINDOW, TURBO_CACHE_SINKS (tokens), TURBO_CALIBRATION (0, 1 or force)
//   the default              that each field names

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

#define LLAMA_TURBO_UNSAID (-1)

enum llama_turbo_use {
    LLAMA_TURBO_USE_NONE  = 0,
    LLAMA_TURBO_USE_FIT   = 1, // where it fits: quantized keys, and a context no longer than what it was measured for
    LLAMA_TURBO_USE_FORCE = 2, // for every type and length, which tests the arithmetic
};

// Every field may be LLAMA_TURBO_UNSAID.
struct llama_turbo_params {
    int32_t cache_window; // tokens at the end of each sequence that are kept at full precision; by default with
                          // turbo types a 64th of the context, between 64 and 1024, and 0 with others
    int32_t cache_sinks;  // tokens at its beginning that are kept as well, where there is a window; by default 4
    int32_t calibration;  // enum llama_turbo_use of the calibration in the file; by default LLAMA_TURBO_USE_FIT
};

// Nothing said.
LLAMA_API struct llama_turbo_params llama_turbo_default_params(void);

// For the next context made on this thread, and for no other, whether it can be made or not. False, with a line in the
// log, if a field cannot have its value; then nothing has changed.
LLAMA_API bool llama_turbo_set_next(const struct llama_turbo_params * params);

// For all contexts of the process. draft: for those made beside another (ctx_other), as of draft models; they take what
// is unsaid from the options of the others. False as above.
LLAMA_API bool llama_turbo_set_options(const struct llama_turbo_params * params, bool draft);

#ifdef __cplusplus
}

#include <string>

// The number of tokens that an option or a variable says; LLAMA_TURBO_UNSAID if it says none.
inline int32_t llama_turbo_number_of_tokens(const std::string & text) {
    const bool is_number = !text.empty() && text.size() <= 9 && text.find_first_not_of("0123456789") == std::string::npos;
    return is_number ? std::stoi(text) : LLAMA_TURBO_UNSAID;
}

// What holds for the context that this thread is making, all fields said but cache_window, whose default depends on
// types. Throws where the environment says what cannot be.
void llama_turbo_take_params(bool is_draft);
const llama_turbo_params & llama_turbo_taken_params();
bool llama_turbo_is_draft(); // whether it is made beside another
#endif
