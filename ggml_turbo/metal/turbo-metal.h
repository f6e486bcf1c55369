#pragma once

// The turbo types on Metal, and attention with a recent window (ops/turbo-window.h): what llama.cpp's Metal back end
// asks of ours. Its kernels are a library of their own, which holds its source: whether llama.cpp embeds its kernels or
// has them on disk makes no difference to them.

#include "ggml-metal-device.h"

#ifdef __cplusplus
extern "C" {
#endif

// Whether a node has a type of ours, or is an operator of ours.
bool ggml_metal_turbo_is_ours(const struct ggml_tensor * op);

// 1 or 0: the device computes the node or not; -1: it has nothing of ours, and llama.cpp's code decides.
int ggml_metal_turbo_supports(ggml_metal_device_t device, const struct ggml_tensor * op);

// Whether a node was one of ours, which is then computed.
bool ggml_metal_turbo_encode(ggml_metal_device_t device, ggml_metal_encoder_t encoder, const struct ggml_tensor * op);

#ifdef __cplusplus
}
#endif
