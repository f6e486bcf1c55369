#pragma once

// The options of llama.cpp's programs for what llama/turbo-settings.h says of contexts.

#include "arg.h"

#include <functional>

void llama_turbo_add_options(const std::function<void(common_arg)> & add_opt);
