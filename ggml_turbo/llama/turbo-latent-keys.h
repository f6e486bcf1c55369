#pragma once

// Keys of multi-head latent attention (MLA, arXiv 2405.04434, section 2.1): one compressed vector a token, whose first part
// is the value as well. Queries and keys are rotated by the Hadamard matrix H of 64 values, block by block, so that no
// channel is far larger than the others of its block; since H H = I, the result of attention, a sum of rotated values, is
// rotated back by H, too.
//
// llama.cpp rotates other quantized keys itself, and these not.

#include "llama.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <map>
#include <memory>
#include <vector>

class llama_turbo_latent {
public:
    // layers: by the index of the layer in the model, where its keys are.
    static std::shared_ptr<llama_turbo_latent> make(const std::map<uint32_t, ggml_backend_buffer_type_t> & layers);

    // H, F32 [64, 64], where layer il is.
    ggml_tensor * rotation(int32_t il) const;

    // x rotated: F32, its first dimension a multiple of 64.
    ggml_tensor * rotate(ggml_context * ctx, ggml_tensor * x, int32_t il) const;

    // The result of attention [value size * heads, tokens] rotated back and decompressed by v_mla [value size, head size,
    // heads]; null: it stays compressed.
    ggml_tensor * decompress(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * v_mla, int64_t n_head, int32_t il) const;

private:
    std::map<int32_t, ggml_tensor *>                                  rotations; // by layer
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> bufs;
};
