// What a compiler calls before memory accesses with -fsanitize=thread, with its arguments; linked in place of the library
// of that sanitizer. Compile without the flag.

#include "core.h"

#define SIMT_ACCESSES(SIZE)                                                                                           \
    extern "C" void __tsan_read##SIZE(void * p)            { simt::access(p, SIZE, false, __builtin_return_address(0)); } \
    extern "C" void __tsan_write##SIZE(void * p)           { simt::access(p, SIZE, true, __builtin_return_address(0)); }  \
    extern "C" void __tsan_unaligned_read##SIZE(void * p)  { simt::access(p, SIZE, false, __builtin_return_address(0)); } \
    extern "C" void __tsan_unaligned_write##SIZE(void * p) { simt::access(p, SIZE, true, __builtin_return_address(0)); }
SIMT_ACCESSES(1)
SIMT_ACCESSES(2)
SIMT_ACCESSES(4)
SIMT_ACCESSES(8)
SIMT_ACCESSES(16)

extern "C" void * __tsan_memcpy(void * to, const void * from, size_t n) {
    if (n) {
        simt::access(from, n, false, __builtin_return_address(0));
        simt::access(to, n, true, __builtin_return_address(0));
    }
    return memcpy(to, from, n);
}
extern "C" void * __tsan_memmove(void * to, const void * from, size_t n) {
    if (n) {
        simt::access(from, n, false, __builtin_return_address(0));
        simt::access(to, n, true, __builtin_return_address(0));
    }
    return memmove(to, from, n);
}
extern "C" void * __tsan_memset(void * to, int value, size_t n) {
    if (n) {
        simt::access(to, n, true, __builtin_return_address(0));
    }
    return memset(to, value, n);
}

extern "C" void __tsan_init() { simt::checked = true; }
extern "C" void __tsan_func_entry(void *) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_read(void **) {}
extern "C" void __tsan_vptr_update(void **, void *) {}
