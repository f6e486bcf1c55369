// When a program that uses llama.cpp's common library ends, its log is written out, and if it could make no context the
// reason is its last line: what the program itself says is only that it could not.

#include "llama/turbo-last-error.h"
#include "log.h"

#include <cstdio>
#include <cstdlib>

#ifndef _WIN32
static const int registered = std::atexit([] {
    common_log_pause(common_log_main());
    if (*llama_turbo_last_error()) {
        fprintf(stderr, "no context could be made: %s\n", llama_turbo_last_error());
    }
});
#endif
