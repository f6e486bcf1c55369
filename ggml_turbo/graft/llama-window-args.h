#pragma once

// What --cache-window and --cache-sinks do: set the variables that every cache reads (llama/turbo-recent-window.h).

#include <cstdlib>
#include <stdexcept>
#include <string>

// Throws if the text is no number of tokens.
static void llama_turbo_set_variable(const char * name, const std::string & text) {
    if (text.empty() || text.size() > 9 || text.find_first_not_of("0123456789") != std::string::npos) {
        throw std::invalid_argument("'" + text + "' is not a number of tokens");
    }
#ifdef _WIN32
    _putenv_s(name, text.c_str());
#else
    setenv(name, text.c_str(), 1);
#endif
}
