#include "turbo-latent-keys.h"

#include "ggml-turbo.h"
#include "llama-impl.h"

#include <cmath>
#include <stdexcept>

std::shared_ptr<llama_turbo_latent> llama_turbo_latent::make(const std::map<uint32_t, ggml_backend_buffer_type_t> & layers) {
    std::vector<float> hadamard(QK_TURBO*QK_TURBO); // Sylvester's: the sign of an entry is the parity of row & column
    for (uint32_t i = 0; i < hadamard.size(); ++i) {
        uint32_t bits = (i/QK_TURBO) & (i%QK_TURBO), parity = 0;
        for (; bits != 0; bits >>= 1) {
            parity ^= bits & 1;
        }
        hadamard[i] = (parity ? -1.0f : 1.0f)/std::sqrt((float) QK_TURBO);
    }
    auto made = std::make_shared<llama_turbo_latent>();
    std::map<ggml_backend_buffer_type_t, ggml_tensor *> by_place;
    for (const auto & [il, buft] : layers) {
        ggml_tensor *& rotation = by_place[buft];
        if (!rotation) {
            ggml_context_ptr ctx(ggml_init({ ggml_tensor_overhead(), nullptr, true }));
            rotation = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, QK_TURBO, QK_TURBO);
            ggml_backend_buffer_ptr buf(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));
            if (!buf) {
                throw std::runtime_error("failed to allocate the rotation of the keys");
            }
            ggml_backend_tensor_set(rotation, hadamard.data(), 0, ggml_nbytes(rotation));
            made->bufs.emplace_back(std::move(ctx), std::move(buf));
        }
        made->rotations[il] = rotation;
    }
    return made;
}

ggml_tensor * llama_turbo_latent::rotation(int32_t il) const {
    return rotations.at(il);
}

ggml_tensor * llama_turbo_latent::rotate(ggml_context * ctx, ggml_tensor * x, int32_t il) const {
    return llama_mul_mat_hadamard(ctx, x, rotation(il));
}

ggml_tensor * llama_turbo_latent::decompress(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * v_mla, int64_t n_head, int32_t il) const {
    cur = rotate(ctx, cur, il);
    if (!v_mla) {
        return cur;
    }
    const int64_t n_tokens = cur->ne[1];
    cur = ggml_reshape_3d(ctx, cur, cur->ne[0]/n_head, n_head, n_tokens);
    cur = ggml_mul_mat(ctx, v_mla, ggml_permute(ctx, cur, 0, 2, 1, 3)); // head by head, all tokens at once
    return ggml_cont_2d(ctx, ggml_permute(ctx, cur, 0, 2, 1, 3), cur->ne[0]*n_head, n_tokens);
}
