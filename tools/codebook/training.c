// The encoder as training has it: the scale fits the chosen entries by least squares, since the squared error is what
// training lowers. A cache's encoder keeps the norm instead (turbo_fit_scale), which is for what is made of the values.

#include "format/turbo-reference.c"
#include "cpu/turbo-cpu.c"

static int least_squares_scale(const turbo_codec * codec, const turbo_candidate * best, const uint8_t * states) {
    int32_t xc = 0, cc = 0; // at most 64*32767*127 and 64*127*127
    for (int i = 0; i < QK_TURBO; ++i) {
        const int c = codec->codebook[states[i]];
        xc += best->target[i]*c;
        cc += c*c;
    }
    if (xc <= 0) {
        return best->scale_code;
    }
    const float ratio = (float) xc/(float) (256*cc);
    return turbo_scale_code(codec->bits, turbo_scale_value(codec->bits, best->scale_code)*ratio);
}

void turbo_train_blocks(const turbo_codec * codec, const float * x, uint8_t * blocks, int64_t n_blocks) {
    turbo_search_t    search    = turbo_search;
    turbo_traceback_t traceback = turbo_traceback;
#ifdef TURBO_LANES
#define FAST(K) if (codec->bits == K) { search = turbo_search_##K; traceback = turbo_traceback_##K; }
    TURBO_SEARCHED(FAST)
#endif
    const int size = TURBO_BLOCK_BYTES(codec->bits);
    for (int64_t i = 0; i < n_blocks; ++i) {
        turbo_candidate         candidates[2];
        const turbo_candidate * best = turbo_best_candidate(codec, x + i*QK_TURBO, candidates, search);
        uint8_t                 states[1][QK_TURBO];
        if (!best) {
            memset(blocks + i*size, 0, size);
            continue;
        }
        traceback(codec, 1, &best, states);
        turbo_pack(codec->bits, least_squares_scale(codec, best, states[0]), states[0], blocks + i*size);
    }
}
