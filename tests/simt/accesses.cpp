// What a compiler calls before memory accesses with -fsanitize=thread, linked in place of that sanitizer's library.
// Compile without the flag. "Unaligned" are those that the source says may be.

#include "core.h"

static void aligned(const void * p, size_t size, bool write, const void * code) {
    simt::require_alignment(p, size, code);
    simt::access(p, size, write, code);
}

#define SIMT_CODE __builtin_return_address(0)
#define SIMT_ACCESSES(SIZE)                                                                          \
    extern "C" void __tsan_read##SIZE(void * p)            { aligned(p, SIZE, false, SIMT_CODE); }      \
    extern "C" void __tsan_write##SIZE(void * p)           { aligned(p, SIZE, true, SIMT_CODE); }       \
    extern "C" void __tsan_unaligned_read##SIZE(void * p)  { simt::access(p, SIZE, false, SIMT_CODE); } \
    extern "C" void __tsan_unaligned_write##SIZE(void * p) { simt::access(p, SIZE, true, SIMT_CODE); }
SIMT_ACCESSES(1)
SIMT_ACCESSES(2)
SIMT_ACCESSES(4)
SIMT_ACCESSES(8)
SIMT_ACCESSES(16)

extern "C" void * __tsan_memcpy(void * to, const void * from, size_t n) {
    if (n) {
        simt::access(from, n, false, SIMT_CODE);
        simt::access(to, n, true, SIMT_CODE);
    }
    return memcpy(to, from, n);
}
extern "C" void * __tsan_memmove(void * to, const void * from, size_t n) {
    if (n) {
        simt::access(from, n, false, SIMT_CODE);
        simt::access(to, n, true, SIMT_CODE);
    }
    return memmove(to, from, n);
}
extern "C" void * __tsan_memset(void * to, int value, size_t n) {
    if (n) {
        simt::access(to, n, true, SIMT_CODE);
    }
    return memset(to, value, n);
}

extern "C" void __tsan_init() { simt::checked = true; }
extern "C" void __tsan_func_entry(void *) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_read(void **) {}
extern "C" void __tsan_vptr_update(void **, void *) {}
