#pragma once

// What the fuzz targets share: numbers that depend on the seed and the input alone, and memory that ends where it ends.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

class fuzz_random {
public:
    fuzz_random(uint64_t seed, uint64_t input) : state(seed*0xd1342543de82ef95u + input*0x9e3779b97f4a7c15u) {
        bits();
    }

    uint64_t bits() { // splitmix64
        uint64_t z = (state += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30))*0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27))*0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }

    uint64_t below(uint64_t n) { return bits() % n; }            // n > 0
    bool     one_in(uint64_t n) { return below(n) == 0; }
    float    uniform() { return (float) (bits() >> 40)/(1 << 24); } // from 0 up to 1

    float gaussian() {
        float sum = -6.0f;
        for (int i = 0; i < 12; ++i) {
            sum += uniform();
        }
        return sum;
    }

    // One of them.
    template <typename C>
    auto & of(const C & from) { return *(std::begin(from) + below(std::size(from))); }

    template <typename T>
    T pick(std::initializer_list<T> from) { return *(from.begin() + below(from.size())); }

    void fill(void * to, size_t size) {
        for (size_t i = 0; i < size; ++i) {
            ((uint8_t *) to)[i] = (uint8_t) bits();
        }
    }

    // A float that a program has no use for, or any bit pattern.
    float hostile_float() {
        if (one_in(3)) {
            const uint32_t any = (uint32_t) bits();
            float f;
            memcpy(&f, &any, sizeof(f));
            return f;
        }
        using limits = std::numeric_limits<float>;
        return pick({ 0.0f, -0.0f, 1.0f, -1.0f, limits::infinity(), -limits::infinity(), limits::quiet_NaN(), limits::max(),
            -limits::max(), limits::min(), limits::denorm_min(), -limits::denorm_min(), 65504.0f, 65536.0f, 536870912.0f, 0x1p-40f });
    }

    // A number for a length, a count, a position or a type.
    uint64_t hostile_integer() {
        const uint64_t n = pick({ (uint64_t) 0, (uint64_t) INT32_MAX, (uint64_t) UINT32_MAX, (uint64_t) INT64_MAX, below(300), bits() });
        return n + below(5) - 2;
    }

private:
    uint64_t state;
};

// Bytes in memory of exactly this size, so that the address sanitizer sees whatever is read or written beside them.
class fuzz_bytes {
public:
    explicit fuzz_bytes(size_t size) : n(size), bytes((uint8_t *) malloc(size)) {}
    ~fuzz_bytes() { free(bytes); }
    fuzz_bytes(const fuzz_bytes &) = delete;
    fuzz_bytes & operator=(const fuzz_bytes &) = delete;

    size_t    size() const { return n; }
    uint8_t * data() { return bytes; }
    template <typename T> T * as() { return (T *) bytes; }

private:
    size_t    n;
    uint8_t * bytes;
};

class fuzz_target {
public:
    virtual ~fuzz_target() = default;
    virtual void run(fuzz_random & random) = 0; // one input
    virtual std::string summary() const = 0;    // what became of them
};

std::unique_ptr<fuzz_target> fuzz_blocks();
std::unique_ptr<fuzz_target> fuzz_metadata();
std::unique_ptr<fuzz_target> fuzz_states();

// Ends the process if not ok, saying what is wrong and how to repeat it.
void expect(bool ok, const std::string & what);
