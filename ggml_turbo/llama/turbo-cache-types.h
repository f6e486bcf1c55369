#pragma once

// Whether a context can have the cache types it is asked for.

#include "ggml-turbo.h"
#include "llama.h"

struct llama_model;

// Refuses numbers that are no type, head sizes that a type's blocks do not divide, and devices that do not write a type, with
// a line in the log that says what works instead. For a model that keeps no keys and values, the types become F16, which
// every model can have.
bool llama_turbo_check_types(const llama_model & model, llama_context_params & params);
