#pragma once

// Rotary positions (RoPE, arXiv 2104.09864) of a layer's keys as angles: the channels of a head turn in pairs, each by an
// angle of its own for each position.

#include <cstdint>
#include <utility>
#include <vector>

struct llama_cparams;
struct llama_model;

struct llama_turbo_rope {
    std::vector<double> angles;  // radians a position, for each pair
    bool                is_neox; // pairs are (i, i + n/2), not (2i, 2i + 1)
    uint32_t            n_embd;  // channels of a head; those after the pairs do not turn

    // Of layer il, in a context; no pairs if its keys have no rotary position that one angle a pair describes.
    static llama_turbo_rope of(const llama_model & model, const llama_cparams & cparams, uint32_t il);

    uint32_t n_rot() const { return 2*angles.size(); } // channels that turn

    // The cosines of the angles by which all channels have turned at a position, then the sines: [2*n_embd].
    std::vector<float> basis(double pos) const;

    std::pair<uint32_t, uint32_t> channels(uint32_t pair) const {
        return is_neox ? std::make_pair(pair, pair + n_rot()/2) : std::make_pair(2*pair, 2*pair + 1);
    }

    bool operator==(const llama_turbo_rope & other) const {
        return angles == other.angles && is_neox == other.is_neox && n_embd == other.n_embd;
    }
};
