#include "turbo-last-error.h"

#include <cstdio>
#include <mutex>
#include <string>

static std::mutex  mutex;
static std::string last_error;

void llama_turbo_note_error(ggml_log_level level, const char * format, va_list arguments) {
    if (level != GGML_LOG_LEVEL_ERROR) {
        return;
    }
    va_list again;
    va_copy(again, arguments);
    const int size = vsnprintf(nullptr, 0, format, again);
    va_end(again);
    if (size <= 0) {
        return;
    }
    std::string text(size + 1, '\0');
    va_copy(again, arguments);
    vsnprintf(&text[0], text.size(), format, again);
    va_end(again);

    const size_t name  = text.find(": ");
    const size_t begin = name != std::string::npos && name < text.find(' ') ? name + 2 : 0;
    const size_t end   = text.find_first_of(std::string("\n\0", 2), begin);
    std::lock_guard<std::mutex> lock(mutex);
    last_error = text.substr(begin, end - begin);
}

void llama_turbo_forget_errors() {
    std::lock_guard<std::mutex> lock(mutex);
    last_error.clear();
}

const char * llama_turbo_last_error(void) {
    std::lock_guard<std::mutex> lock(mutex);
    return last_error.c_str();
}
