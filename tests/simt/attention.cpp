// The attention kernels of CUDA in the emulator: reads problems from standard input, each after the numbers that say
// how it is run, and writes their results to standard output, as test_cuda_attention.py has them.

#include <memory> // before the dialect's macros

#include "tensor_cores.h"

#include "cuda/turbo-attention.cu"

#include "attention_problem.h"

SIMT_DYNAMIC_SHARED(uint32_t, turbo_attention_memory);

struct how {
    int32_t schedule, seed;
    int32_t cc, multiprocessors, shared_bytes; // of the device
    int32_t late; // bytes by which keys and values begin after a word
};

// The tensor's memory as the device has it.
static std::unique_ptr<simt::input<char>> to_device(tensor & t, size_t late) {
    std::vector<char> bytes(late, (char) simt::poison);
    bytes.insert(bytes.end(), t.memory.begin(), t.memory.end());
    auto memory = std::make_unique<simt::input<char>>(bytes, 16);
    t.data = (void *) (memory->data() + late);
    return memory;
}

int main() {
    how how;
    problem::numbers numbers;
    while (read(&how, sizeof(how)) && read(&numbers, sizeof(numbers))) {
        problem p(numbers);
        std::vector<std::unique_ptr<simt::input<char>>> memory;
        for (tensor * t : { &p.q, &p.k, &p.v, &p.mask, &p.sinks, &p.ring, &p.new_k, &p.new_v, &p.mask_w, &p.columns }) {
            memory.push_back(to_device(*t, t == &p.k || t == &p.v ? (size_t) how.late : 0));
        }
        simt::output<float> result(p.out.memory.size()/sizeof(float), 16);
        p.out.data = result.data();

        simt_device.devices[0] = { how.cc, how.multiprocessors, (size_t) how.shared_bytes };
        simt::shared_begin = turbo_describe_device(0).shared_begin;
        if (!turbo_takes_attention(0, &p.out)) {
            fprintf(stderr, "the kernels do not take this problem\n");
            return 1;
        }
        simt::set_schedule((simt::schedule) how.schedule, (unsigned) how.seed);
        simt::copies_are_late = how.seed % 2 == 0;
        ggml_backend_cuda_context context;
        turbo_compute_attention(context, &p.out);
        const std::vector<float> out = result.read();
        fwrite(out.data(), sizeof(float), out.size(), stdout);
    }
    return 0;
}
