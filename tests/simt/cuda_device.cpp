// The kernels that objects of nvcc launch, by name, in the emulator. The name of a kernel is that of the function here.

#include <memory> // before the dialect's macros

#include "tensor_cores.h"

#include "cuda/turbo-encode.cuh"
#include "cuda/turbo-plan.cuh"
#include "cuda/turbo-rows.cuh"

#include <cxxabi.h>

#include <cstdlib>
#include <map>
#include <string>
#include <typeinfo>
#include <utility>

using run = void (*)(dim3 grid, dim3 block, size_t shared, void ** arguments);

template<auto kernel, typename... P, size_t... I>
static void launch(void (*)(P...), std::index_sequence<I...>, dim3 grid, dim3 block, size_t shared, void ** arguments) {
    simt::launch(grid, block, shared, [=] { kernel(*(P *) arguments[I]...); });
}

template<auto kernel, typename... P> static constexpr run runner(void (*)(P...)) {
    return [](dim3 grid, dim3 block, size_t shared, void ** arguments) {
        launch<kernel>(kernel, std::index_sequence_for<P...>(), grid, block, shared, arguments);
    };
}

// "turbo_encode<4>", from the name of a type: "tag<&(void turbo_encode<4>(turbo_tensor, ..."
template<auto kernel> struct tag {};
template<auto kernel> static std::string name() {
    char *            text = abi::__cxa_demangle(typeid(tag<kernel>).name(), nullptr, nullptr, nullptr);
    const std::string whole(text);
    free(text);
    const size_t at = whole.find("turbo_");
    return whole.substr(at, whole.find('(', at) - at);
}

template<auto... kernels> static std::map<std::string, run> table() {
    return { { name<kernels>(), runner<kernels>(kernels) }... };
}

SIMT_DYNAMIC_SHARED(uint32_t, turbo_attention_memory);

#define OF_TYPE(K, ID)                                                                              \
    turbo_encode<K>, turbo_decode<K, float>, turbo_decode<K, half>, turbo_decode<K, nv_bfloat16>,   \
    turbo_unpack<K, false>, turbo_unpack<K, true>,
#define ATTEND(K, V, CHUNKS) turbo_attend<K, V, CHUNKS>,
static const std::map<std::string, run> kernels = table<
    TURBO_TYPES(OF_TYPE) TURBO_ATTENTION_KERNELS(ATTEND)
    turbo_unpack<0, false>, turbo_unpack<0, true>, turbo_attend_slab<1>, turbo_attend_slab<2>,
    turbo_encode_two, turbo_combine, turbo_copy>();

static std::map<std::string, int> launches;

bool simt_run(const std::string & name, const unsigned (&grid)[3], const unsigned (&block)[3], size_t shared,
              void ** arguments) {
    const auto found = kernels.find(name);
    if (found == kernels.end()) {
        return false;
    }
    static unsigned seed;
    ++seed;
    simt::set_schedule(simt::schedules[seed % 3], seed);
    found->second(dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), shared, arguments);
    ++launches[name];
    return true;
}

// How often a kernel was launched so far.
extern "C" int simt_launches(const char * name) {
    return launches[name];
}
