#pragma once

// Emitted by ggml_turbo/format/emit.py from codebooks.toml; do not edit.

// X(k, number in ggml) of every turbo type. A list of types anywhere in C and C++ is made of this one.
#define TURBO_TYPES(X) X(2, 120) X(3, 121) X(4, 122)

#define TURBO_FEWEST_BITS 2
#define TURBO_MOST_BITS   4
