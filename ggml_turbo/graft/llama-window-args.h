#pragma once

// What --cache-window and --cache-sinks do: set the variables that every cache reads (llama/turbo-recent-window.h).

#include <cstdlib>
#include <stdexcept>
#include <string>

static void llama_turbo_set_variable(const char * name, int value) {
    if (value < 0) {
        throw std::invalid_argument("it must not be negative");
    }
    const std::string text = std::to_string(value);
#ifdef _WIN32
    _putenv_s(name, text.c_str());
#else
    setenv(name, text.c_str(), 1);
#endif
}
