#pragma once

// Why the last context that was asked for could not be made, for programs whose last line says only that it could not.

#include "llama.h"

#ifdef __cplusplus
#include <cstdarg>

// Called with every message of llama.cpp's log.
void llama_turbo_note_error(ggml_log_level level, const char * format, va_list arguments);

// Called when a context is asked for, and when it has been made.
void llama_turbo_forget_errors();

extern "C" {
#endif

// The last error since a context was asked for, without the name of a function before it and without a line's end; empty if
// there was none, or the context was made. Valid until the next one.
LLAMA_API const char * llama_turbo_last_error(void);

#ifdef __cplusplus
}
#endif
