// Loaded before libllama, makes the attention of layers from FIRST_LAYER on pass by ours, as that of an architecture with
// a graph of its own does. CALIBRATE and ATTEND: the linker's names of llama_turbo_kv's functions. PLANT: which part is
// lost.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdbool.h>
#include <stdlib.h>

enum { FIRST_LAYER = 1, QUERIES = 1, KEYS = 2, BOTH = 3, WINDOW = 4 };

static void * original(const char * name) {
    return dlsym(dlopen(getenv("PLANTED_LIBLLAMA"), RTLD_NOW | RTLD_NOLOAD), name);
}

#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)

void CALIBRATE(void * ctx, void * res, const void * batch, bool is_swa, void ** q, void ** k, int il) {
    void (*calibrate)(void *, void *, const void *, bool, void **, void **, int) = original(TEXT(CALIBRATE));
    void * q_before = *q, * k_before = *k;
    calibrate(ctx, res, batch, is_swa, q, k, il);
    if (il >= FIRST_LAYER && (PLANT & QUERIES)) {
        *q = q_before;
    }
    if (il >= FIRST_LAYER && (PLANT & KEYS)) {
        *k = k_before;
    }
}

void * ATTEND(
        void * ctx, void * gf, void * sched, void * res, void * memory, void * batch, void * hparams, void * cparams, void * q,
        void * k, void * v, void * k_cur, void * v_cur, void * bias, void * mask, void * sinks, float scale, int il) {
    void * (*attend)(void *, void *, void *, void *, void *, void *, void *, void *, void *, void *, void *, void *, void *,
        void *, void *, void *, float, int) = original(TEXT(ATTEND));
    return il >= FIRST_LAYER && (PLANT & WINDOW)
        ? NULL
        : attend(ctx, gf, sched, res, memory, batch, hparams, cparams, q, k, v, k_cur, v_cur, bias, mask, sinks, scale, il);
}
