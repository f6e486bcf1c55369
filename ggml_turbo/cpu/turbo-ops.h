#pragma once

#include "ggml-backend.h"
#include "ggml-turbo.h"

// How our operators get into ggml's CPU back end: it asks its "extra buffer types", and only them, who wants an
// operator. So this is one, though no tensor ever lives in it. NULL without SIMD: the stock operators then do the work.
ggml_backend_buffer_type_t ggml_backend_cpu_turbo_buffer_type(void);

#ifdef __cplusplus

#include "traits.h"

// Each returns what computes op, or nullptr if op is not for it.
ggml::cpu::tensor_traits * turbo_attention_claims(const ggml_tensor * op); // turbo-attention.cpp
ggml::cpu::tensor_traits * turbo_hadamard_claims(const ggml_tensor * op);  // turbo-hadamard.cpp
ggml::cpu::tensor_traits * turbo_set_rows_claims(const ggml_tensor * op);  // turbo-set-rows.cpp

#endif
