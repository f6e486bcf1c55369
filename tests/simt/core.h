#pragma once

// Runs a kernel of a GPU on the CPU, for tests: every thread of a block is a fiber, the threads of a block take turns
// in a chosen order, and what they do together (barriers, shuffles) is a meeting of the threads concerned. README.md
// says how to use it. This file knows no language of kernels; cuda.h beside it is the dialect of CUDA.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

namespace simt {

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Where in a kernel's source something is done; a default argument of this type is the place of the call.
struct place {
    const char * file;
    unsigned     line;
    static constexpr place here(const char * file = __builtin_FILE(), unsigned line = __builtin_LINE()) {
        return { file, line };
    }
};

// ---- running ----

// In which order the threads of a block that can go on do so: by number, or anew at random for every turn.
enum class schedule { ascending, descending, shuffled };
inline constexpr schedule schedules[] = { schedule::ascending, schedule::descending, schedule::shuffled };

// For all launches from now on.
void set_schedule(schedule order, unsigned seed = 0);

// Runs `kernel` once for each thread of each block; returns when all are done. shared_bytes: of dynamic shared memory.
// in_order: what launches before this one accessed is before what it does; if not, only what is before the last that was
// in order, as where a queue runs several at a time: checked accesses then find races between launches.
void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()> & kernel, bool in_order = true);

// Says on stderr what is wrong, where, and in which thread of which block; ends the process with status 70.
[[noreturn]] void fail(const char * format, ...) __attribute__((format(printf, 1, 2)));

// ---- what a thread knows of itself ----

struct built_in {
    dim3 thread_index, block_index, block_dim, grid_dim;
};
extern built_in current;    // of the running thread
unsigned thread_number();   // in its block, x fastest
uint64_t live_lanes();      // of its group: those that have not ended
inline constexpr unsigned group_size = 32; // threads of a warp or SIMD group

// ---- meetings ----

inline constexpr size_t most_given = 256; // bytes that a thread can give

// The threads of the running one's group that `mask` names wait for each other. Each gives `size` bytes; returns those
// of lane i at i*most_given, valid until its next meeting with the same mask. ordered: memory accesses before the
// meeting are before those after it, for all of them.
const uint8_t * meet(uint64_t mask, const void * given, size_t size, bool ordered, place where);

// All threads of the block that have not ended; always ordered.
void meet_block(place where);

// The same with values.
template<typename T> struct given {
    const uint8_t * bytes;
    T operator[](unsigned lane) const {
        T value;
        memcpy(&value, bytes + lane*most_given, sizeof(T));
        return value;
    }
};
template<typename T> given<T> meet(uint64_t mask, const T & value, place where) {
    static_assert(sizeof(T) <= most_given && std::is_trivially_copyable_v<T>, "what a thread gives is copied");
    return { meet(mask, &value, sizeof(T), false, where) };
}

// ---- memory ----

// Dynamic shared memory: tell the variable once, before launches.
struct dynamic_shared {
    dynamic_shared(void * data, size_t capacity);
};

// Memory of the device between two pages that no access survives. Its end is at the second page, but for what its
// alignment leaves (at most alignment - 1 bytes, which are checked when it is freed).
class memory {
  public:
    memory(size_t bytes, size_t alignment, bool writable, const char * name);
    ~memory();
    memory(const memory &) = delete;
    memory & operator=(const memory &) = delete;
    uint8_t * data() const { return begin; }
    size_t    size() const { return bytes; }
    void      fill(const void * from); // the whole of it, from the host
    void      written(size_t first, size_t n); // the host has written a part, which may now be read

  private:
    uint8_t * pages, * begin;
    size_t    bytes, mapped;
    bool      writable;
};

// An array that kernels read. alignment: in bytes, of its first element and no better than that.
template<typename T> class input {
  public:
    input(const T * from, size_t n, size_t alignment = alignof(T)) : store(n*sizeof(T), alignment, false, "input") {
        store.fill(from);
    }
    explicit input(const std::vector<T> & from, size_t alignment = alignof(T))
        : input(from.data(), from.size(), alignment) {}
    const T * data() const { return (const T *) store.data(); }
    operator const T *() const { return data(); }

  private:
    memory store;
};

// An array that kernels write; poisoned, unless it is filled.
template<typename T> class output {
  public:
    explicit output(size_t n, size_t alignment = alignof(T)) : store(n*sizeof(T), alignment, true, "output") {}
    explicit output(const std::vector<T> & from, size_t alignment = alignof(T)) : output(from.size(), alignment) {
        store.fill(from.data());
    }
    T * data() const { return (T *) store.data(); }
    operator T *() const { return data(); }
    size_t size() const { return store.size()/sizeof(T); }
    std::vector<T> read() const {
        std::vector<T> out(size());
        memcpy((void *) out.data(), store.data(), store.size());
        return out;
    }

  private:
    memory store;
};

// What shared memory holds before a kernel writes it, and outputs: NaN in every float format, unlikely as an integer.
inline constexpr uint8_t poison = 0xfb;

// ---- checked accesses: accesses.cpp calls these where kernels are compiled with -fsanitize=thread ----

// The running thread reads or writes memory in the instruction before `code`. Reports accesses outside of arrays, reads
// of what nothing wrote, and races: two accesses of different threads, one of them a write, without a barrier between.
void access(const void * address, size_t size, bool write, const void * code);

// Reports an address that is no multiple of `size`.
void require_alignment(const void * address, size_t size, const void * code);

// An atomic operation, which races with no other.
void access_atomic(const void * address, size_t size);

extern bool checked; // whether this program's accesses are

// How many accesses there were so far, by their bytes: what a kernel does, for one that is compared with another.
struct access_counts {
    uint64_t array_reads[17], shared_reads[17], shared_writes[17];
};
extern access_counts counted;

} // namespace simt
