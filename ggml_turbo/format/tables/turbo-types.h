#pragma once

// Emitted by ggml_turbo/format/emit.py from codebooks.toml; do not edit.

// X(k, number in ggml) of every turbo type. A list of types anywhere in C and C++ is made of this one.
#define TURBO_TYPES(X) X(2, 120) X(3, 121) X(4, 122)

#define TURBO_FEWEST_BITS 2
#define TURBO_MOST_BITS   4

// For ggml.h and the lists of types in llama.cpp.
#define TURBO_TYPE_COUNT 123
#define TURBO_ENUMERATOR(K, ID) GGML_TYPE_TURBO##K = ID,
#define TURBO_TYPE(K, ID)       GGML_TYPE_TURBO##K,
#define TURBO_CASE(K, ID)       case GGML_TYPE_TURBO##K:
