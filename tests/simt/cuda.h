#pragma once

// CUDA as the emulator runs it: what kernels of ours use of the language, in C++. Compile with clang++ -x c++.

#include "core.h"

#include <algorithm>
#include <cmath>
#include <cfloat>
#include <climits>

#define SIMT // for sources that are also compiled for devices

// ---- the language ----

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__    __attribute__((noinline))
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(n) __attribute__((aligned(n)))
#define __shared__   thread_local // static at block scope, and `extern` is allowed; see core.cpp

// At namespace scope, once for each name of dynamic shared memory in kernels (extern __shared__ T name[];).
#define SIMT_DYNAMIC_SHARED(type, name)                                  \
    alignas(128) thread_local type name[227*1024/sizeof(type)];          \
    static simt::dynamic_shared simt_dynamic_##name(name, sizeof(name))

using simt::dim3;
#define threadIdx (simt::current.thread_index)
#define blockIdx  (simt::current.block_index)
#define blockDim  (simt::current.block_dim)
#define gridDim   (simt::current.grid_dim)
#define warpSize  32

#define SIMT_WHERE simt::place where = simt::place::here()

// ---- what threads do together ----

inline void __syncthreads(SIMT_WHERE) { simt::meet_block(where); }
inline void __syncwarp(unsigned mask = ~0u, SIMT_WHERE) { simt::meet(mask, nullptr, 0, true, where); }

namespace simt {
inline unsigned lane() { return thread_number() % group_size; }

// What lane `from` of the mask gave; the thread's own where `from` is not in it (CUDA says: undefined).
template<typename T> T shuffle(unsigned mask, const T & value, unsigned from, place where) {
    const given<T> all = meet(mask, value, where);
    if (!(mask >> from & 1)) {
        fail("reads lane %u, which is not in the mask %08x, at %s:%u", from, mask, where.file, where.line);
    }
    return all[from];
}
inline unsigned segment(int width) { return lane() & ~(unsigned) (width - 1); } // the first lane of this one's segment
} // namespace simt

template<typename T> T __shfl_sync(unsigned mask, T value, int from, int width = 32, SIMT_WHERE) {
    return simt::shuffle(mask, value, simt::segment(width) | ((unsigned) from & (unsigned) (width - 1)), where);
}
template<typename T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, SIMT_WHERE) {
    const unsigned from = simt::lane() ^ (unsigned) bits;
    return simt::shuffle(mask, value, from < simt::segment(width) + (unsigned) width ? from : simt::lane(), where);
}
template<typename T> T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, SIMT_WHERE) {
    const unsigned lane = simt::lane();
    return simt::shuffle(mask, value, lane >= simt::segment(width) + by ? lane - by : lane, where);
}
template<typename T> T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, SIMT_WHERE) {
    const unsigned from = simt::lane() + by;
    return simt::shuffle(mask, value, from < simt::segment(width) + (unsigned) width ? from : simt::lane(), where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_WHERE) {
    const simt::given<int> all = simt::meet(mask, predicate, where);
    unsigned               bits = 0;
    for (unsigned i = 0; i < 32; ++i) {
        bits |= (unsigned) ((mask >> i & 1) && all[i] != 0) << i;
    }
    return bits;
}
inline int __any_sync(unsigned mask, int predicate, SIMT_WHERE) { return __ballot_sync(mask, predicate, where) != 0; }
inline int __all_sync(unsigned mask, int predicate, SIMT_WHERE) {
    return __ballot_sync(mask, predicate, where) == mask;
}
template<typename T, typename F> T simt_reduce(unsigned mask, T value, F f, simt::place where) {
    const simt::given<T> all = simt::meet(mask, value, where);
    const unsigned       first = (unsigned) __builtin_ctz(mask);
    T                    out = all[first];
    for (unsigned i = first + 1; i < 32; ++i) {
        out = mask >> i & 1 ? f(out, all[i]) : out;
    }
    return out;
}
template<typename T> T __reduce_min_sync(unsigned mask, T v, SIMT_WHERE) {
    return simt_reduce(mask, v, [](T a, T b) { return b < a ? b : a; }, where);
}
template<typename T> T __reduce_max_sync(unsigned mask, T v, SIMT_WHERE) {
    return simt_reduce(mask, v, [](T a, T b) { return a < b ? b : a; }, where);
}
template<typename T> T __reduce_add_sync(unsigned mask, T v, SIMT_WHERE) {
    return simt_reduce(mask, v, [](T a, T b) { return a + b; }, where);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
#define SIMT_ATOMIC(name, result)                                                       \
    template<typename T> __attribute__((no_sanitize("thread"))) T name(T * p, T v) {               \
        simt::access_atomic(p, sizeof(T));                                                         \
        const T old = *p;                                                                          \
        *p = result;                                                                               \
        return old;                                                                                \
    }
SIMT_ATOMIC(atomicAdd, old + v)
SIMT_ATOMIC(atomicMax, old < v ? v : old)
SIMT_ATOMIC(atomicMin, v < old ? v : old)
SIMT_ATOMIC(atomicExch, v)
#undef SIMT_ATOMIC
template<typename T> __attribute__((no_sanitize("thread"))) T atomicCAS(T * p, T compare, T v) {
    simt::access_atomic(p, sizeof(T));
    const T old = *p;
    *p = old == compare ? v : old;
    return old;
}

// ---- vectors ----

#define SIMT_VECTOR(T, name)                                                                                        \
    struct alignas(2*sizeof(T)) name##2 { T x, y; };                                                                \
    struct name##3 { T x, y, z; };                                                                                  \
    struct alignas(4*sizeof(T) < 16 ? 4*sizeof(T) : 16) name##4 { T x, y, z, w; };                                  \
    inline name##2 make_##name##2(T x, T y) { return { x, y }; }                                                    \
    inline name##3 make_##name##3(T x, T y, T z) { return { x, y, z }; }                                            \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return { x, y, z, w }; }
SIMT_VECTOR(float, float)
SIMT_VECTOR(int, int)
SIMT_VECTOR(unsigned, uint)
SIMT_VECTOR(short, short)
SIMT_VECTOR(unsigned short, ushort)
SIMT_VECTOR(signed char, char)
SIMT_VECTOR(unsigned char, uchar)
#undef SIMT_VECTOR

// ---- arithmetic ----

template<typename T> T simt_bits(const auto & from) {
    static_assert(sizeof(T) == sizeof(from));
    T to;
    memcpy(&to, &from, sizeof(T));
    return to;
}
inline unsigned __float_as_uint(float f)    { return simt_bits<unsigned>(f); }
inline int      __float_as_int(float f)     { return simt_bits<int>(f); }
inline float    __uint_as_float(unsigned u) { return simt_bits<float>(u); }
inline float    __int_as_float(int i)       { return simt_bits<float>(i); }

inline float __fmul_rn(float a, float b)          { return a*b; }
inline float __fadd_rn(float a, float b)          { return a + b; }
inline float __fsub_rn(float a, float b)          { return a - b; }
inline float __fdiv_rn(float a, float b)          { return a/b; }
inline float __fsqrt_rn(float a)                  { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rd(float a, float b) {
    const double sum = (double) a + b; // exact where it is used: of floats less than 2^29 apart
    const float  f   = (float) sum;
    return f > sum ? nextafterf(f, -INFINITY) : f;
}
inline float __expf(float x)               { return expf(x); }
inline float __fdividef(float a, float b)  { return a/b; }
inline float __frcp_rn(float a)            { return 1.0f/a; }
inline float rsqrtf(float x)               { return 1.0f/sqrtf(x); }
inline int   __float2int_rn(float x)       { return (int) rintf(x); }

template<typename T> T __ldg(const T * p) { return *p; }
template<typename T> constexpr T min(T a, T b) { return b < a ? b : a; }
template<typename T> constexpr T max(T a, T b) { return a < b ? b : a; }
inline int      __popc(unsigned x) { return __builtin_popcount(x); }
inline int      __ffs(int x)       { return __builtin_ffs(x); }
inline int      __clz(int x)       { return x ? __builtin_clz((unsigned) x) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned) ((uint64_t) a*b >> 32); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
    return (unsigned) (((uint64_t) high << 32 | low) >> (by & 31));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
    return (unsigned) (((uint64_t) high << 32 | low) << (by & 31) >> 32);
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selectors) {
    const uint64_t bytes = (uint64_t) b << 32 | a;
    unsigned       out = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned s = selectors >> 4*i & 15, byte = (unsigned) (bytes >> 8*(s & 7)) & 255;
        out |= (s & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8*i;
    }
    return out;
}
inline int __dp4a(int a, int b, int sum) {
    for (int i = 0; i < 4; ++i) {
        sum += (int8_t) (a >> 8*i)*(int8_t) (b >> 8*i);
    }
    return sum;
}

// ---- half and bfloat16 ----

struct __half {
    _Float16 value;
    __half() = default;
    constexpr __half(float f) : value((_Float16) f) {}
    constexpr operator float() const { return (float) value; }
};
struct alignas(4) __half2 { __half x, y; };
using half  = __half;
using half2 = __half2;

struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float f) { // to nearest even, NaN stays one
        const uint32_t u = simt_bits<uint32_t>(f);
        bits = f != f ? (uint16_t) (u >> 16 | 64) : (uint16_t) ((u + 0x7fff + (u >> 16 & 1)) >> 16);
    }
    operator float() const { return simt_bits<float>((uint32_t) bits << 16); }
};
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
using nv_bfloat16  = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

inline float  __half2float(half h)  { return (float) h; }
inline half   __float2half(float f) { return half(f); }
inline half   __float2half_rn(float f) { return half(f); }
inline half2  __floats2half2_rn(float x, float y) { return { half(x), half(y) }; }
inline half2  __float22half2_rn(float2 f) { return { half(f.x), half(f.y) }; }
inline float2 __half22float2(half2 h)     { return { (float) h.x, (float) h.y }; }
inline half2  make_half2(half x, half y)  { return { x, y }; }
inline half2  __halves2half2(half x, half y) { return { x, y }; }
inline half2  __half2half2(half h)        { return { h, h }; }
inline half   __low2half(half2 h)         { return h.x; }
inline half   __high2half(half2 h)        { return h.y; }
inline float  __low2float(half2 h)        { return (float) h.x; }
inline float  __high2float(half2 h)       { return (float) h.y; }
inline unsigned short __half_as_ushort(half h) { return simt_bits<unsigned short>(h); }
inline half  __ushort_as_half(unsigned short u) { return simt_bits<half>(u); }
inline half   simt_half(_Float16 v)       { half h; h.value = v; return h; }
inline half   __hadd(half a, half b)      { return simt_half(a.value + b.value); }
inline half   __hsub(half a, half b)      { return simt_half(a.value - b.value); }
inline half   __hmul(half a, half b)      { return simt_half(a.value*b.value); }
inline half   __hfma(half a, half b, half c) { return half((float) ((double) (float) a*(float) b + (float) c)); }
inline half2  __hadd2(half2 a, half2 b)   { return { __hadd(a.x, b.x), __hadd(a.y, b.y) }; }
inline half2  __hsub2(half2 a, half2 b)   { return { __hsub(a.x, b.x), __hsub(a.y, b.y) }; }
inline half2  __hmul2(half2 a, half2 b)   { return { __hmul(a.x, b.x), __hmul(a.y, b.y) }; }
inline half2  __hfma2(half2 a, half2 b, half2 c) { return { __hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y) }; }
inline half   __hmax(half a, half b)      { return a.value < b.value ? b : a; }
inline half2  __hmax2(half2 a, half2 b)   { return { __hmax(a.x, b.x), __hmax(a.y, b.y) }; }

inline float  __bfloat162float(nv_bfloat16 h)  { return (float) h; }
inline nv_bfloat16 __float2bfloat16(float f)   { return nv_bfloat16(f); }
inline nv_bfloat16 __float2bfloat16_rn(float f) { return nv_bfloat16(f); }
inline float2 __bfloat1622float2(nv_bfloat162 h) { return { (float) h.x, (float) h.y }; }
inline nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return { nv_bfloat16(x), nv_bfloat16(y) }; }
inline unsigned short __bfloat16_as_ushort(nv_bfloat16 h) { return h.bits; }
