#pragma once

#include "ggml-backend.h"

// Claims FLASH_ATTN_EXT on quantized keys or values for the kernel in turbo-attention.cpp. It is a buffer type because
// ggml's CPU back end asks its extra buffer types, and only them, who wants an operator; no tensor lives in it.
// NULL without SIMD: the stock operator then does the work.
ggml_backend_buffer_type_t ggml_backend_cpu_turbo_attention_buffer_type(void);
