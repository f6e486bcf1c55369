#pragma once

// What llama.cpp's CUDA back end asks ours (graft/insertions/ggml-cuda.toml). Both answers come from one table, in
// turbo-cuda.cu: what it does not take is refused, so that the scheduler moves the node to another device.

#include "ggml.h"

#include "format/ggml-turbo.h"

struct ggml_backend_cuda_context;

// Whether a device computes this node: 1 or 0; -1 if nothing of ours is in it.
int ggml_cuda_turbo_supports(int device, const struct ggml_tensor * op);

// Computes a node and returns true; false if llama.cpp's own code is to do it.
bool ggml_cuda_turbo_compute(ggml_backend_cuda_context & context, struct ggml_tensor * op);

// Computes the first of a graph's remaining nodes together with one that follows it, and returns how many behind the
// first are done with it: one launch for keys and values of a token. 0: nothing is computed, each is to be by itself.
int ggml_cuda_turbo_fuse(ggml_backend_cuda_context & context, struct ggml_tensor ** nodes, int n);

// A turbo type, as each of the functions from convert.cuh that turn its blocks into values.
struct ggml_cuda_turbo_converter {
    enum ggml_type type;
    template<typename Function> operator Function() const; // for the six in turbo-rows.cu
};
