#pragma once

// What stands between generated kernels (tests/metal_library.py) and metal_device.cpp: what a dispatch gives to a
// kernel, and the lists in which kernels and function constants register themselves.

#include "../core.h"

namespace simt_metal {

// What the encoder has set for a dispatch.
struct dispatch {
    void * buffer[31];
};

// An argument of a kernel from a buffer: becomes whatever pointer or reference the kernel wants.
struct argument {
    void * memory;
    template<typename T> operator T *() const { return (T *) memory; }
    template<typename T> operator const T &() const { return *(const T *) memory; }
};

using entry = void (*)(const dispatch &);

// The kernels of one source file, which share function constants.
struct kernel_info;
struct constant_info;
struct library {
    const char *    name;
    kernel_info *   kernels   = nullptr;
    constant_info * constants = nullptr;
    library *       next;
    explicit library(const char * name);
};
struct kernel_info {
    const char *  name;
    entry         run;
    kernel_info * next;
    kernel_info(library & l, const char * name, entry run) : name(name), run(run), next(l.kernels) { l.kernels = this; }
};
struct constant_info {
    int             index;
    void *          value;
    size_t          size;
    constant_info * next;
    constant_info(library & l, int index, void * value, size_t size)
        : index(index), value(value), size(size), next(l.constants) { l.constants = this; }
};

// The library that has a kernel of this name; null if none has.
const library * find(const char * kernel, entry & run);

// Memory that the encoder gave a length.
void * threadgroup_memory();

extern uint64_t matrix_products; // of 8x8 values, so far

} // namespace simt_metal
