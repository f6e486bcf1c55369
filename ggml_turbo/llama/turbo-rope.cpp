#include "turbo-rope.h"

#include "llama-cparams.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>

static const double PI = 3.14159265358979323846;

// YaRN (arXiv 2309.00071): the pair that turns this many times within the context that a model was trained for.
static double pair_of_turns(double turns, double n_rot, double n_ctx, double base) {
    return n_rot*std::log(n_ctx/(turns*2.0*PI))/(2.0*std::log(base));
}

// What the model divides the angles by; empty: by nothing.
static std::vector<float> factors_of(const llama_model & model, const llama_cparams & cparams, uint32_t il, size_t n_pairs) {
    const ggml_tensor * factors = model.get_rope_factors(cparams, il);
    if (!factors || !factors->data || model.hparams.no_alloc || (size_t) ggml_nelements(factors) < n_pairs) {
        return {};
    }
    std::vector<float> values(ggml_nelements(factors));
    ggml_backend_tensor_get(factors, values.data(), 0, ggml_nbytes(factors));
    return values;
}

llama_turbo_rope llama_turbo_rope::of(const llama_model & model, const llama_cparams & cparams, uint32_t il) {
    const llama_hparams & hparams = model.hparams;
    llama_turbo_rope rope = { {}, hparams.rope_type != LLAMA_ROPE_TYPE_NORM, hparams.n_embd_head_k(il) };
    if (hparams.rope_type == LLAMA_ROPE_TYPE_NONE || !hparams.has_rope(il)) {
        return rope;
    }
    const double n_rot = hparams.n_rot(il), base = model.get_rope_freq_base(cparams, il), scale = model.get_rope_freq_scale(cparams, il);
    const double n_ctx = cparams.n_ctx_orig_yarn;
    const double fast  = std::max(0.0,         std::floor(pair_of_turns(cparams.yarn_beta_fast, n_rot, n_ctx, base)));
    const double slow  = std::min(n_rot - 1.0, std::ceil (pair_of_turns(cparams.yarn_beta_slow, n_rot, n_ctx, base)));

    const size_t n_pairs = hparams.n_rot(il)/2;
    const auto   factors = factors_of(model, cparams, il, n_pairs);
    for (size_t i = 0; i < n_pairs; ++i) {
        const double angle = std::pow(base, -2.0*i/n_rot)/(factors.empty() ? 1.0 : factors[i]);
        const double ramp  = std::clamp((i - fast)/std::max(0.001, slow - fast), 0.0, 1.0);
        const double kept  = cparams.yarn_ext_factor*(1.0 - ramp); // of the angle as it was, the rest is interpolated
        rope.angles.push_back(angle*(kept + (1.0 - kept)*scale));
    }
    return rope;
}

std::vector<float> llama_turbo_rope::basis(double pos) const {
    std::vector<float> result(2*n_embd, 0.0f);
    std::fill_n(result.begin(), n_embd, 1.0f);
    for (uint32_t pair = 0; pair < angles.size(); ++pair) {
        const auto [x, y] = channels(pair);
        result[x]          = result[y]          = std::cos(angles[pair]*pos);
        result[n_embd + x] = result[n_embd + y] = std::sin(angles[pair]*pos);
    }
    return result;
}
