// The attention kernels of CUDA in the emulator: reads problems from standard input, each after the numbers that say how it
// is run, and writes their results to standard output, as test_cuda_attention.py has them.

#include <memory> // before the dialect's macros

#include "attention_problem.h"

#include "tensor_cores.h"

#include "cuda/turbo-decode.cuh"

SIMT_DYNAMIC_SHARED(uint32_t, turbo_attention_memory);

struct how {
    int32_t schedule, seed;
    int32_t multiprocessors, shared_bytes, shared_begin; // of the device
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
            memory.push_back(to_device(*t, t == &p.k || t == &p.v ? how.late : 0));
        }
        simt::output<float> result(p.out.memory.size()/sizeof(float), 16);
        p.out.data = result.data();

        const turbo_device device = { how.multiprocessors, how.shared_bytes, (uint32_t) how.shared_begin };
        simt::shared_begin = device.shared_begin;
        if (!turbo_attention_takes(&p.out, device)) {
            fprintf(stderr, "the kernels do not take this problem\n");
            return 1;
        }
        turbo_attention_plan plan = turbo_plan_attention(&p.out, device);
        simt::output<float>  partials(plan.partial_floats(), 16);
        simt::output<float2> sums(plan.partial_sums(), 16);
        plan.op.partials     = partials.data();
        plan.op.partial_sums = sums.data();

        simt::set_schedule((simt::schedule) how.schedule, (unsigned) how.seed);
        for (int i = 0; i < plan.n_parts; ++i) {
            const turbo_attention_launch & launch = plan.parts[i];
            turbo_with_kernel(launch, [&](auto k, auto v, auto chunks) {
                simt::launch((unsigned) launch.blocks, (unsigned) launch.threads, (size_t) launch.shared_bytes, [&] {
                    turbo_attend<decltype(k)::value, decltype(v)::value, decltype(chunks)::value>(plan.op, launch.part);
                });
            });
        }
        if (plan.op.n_ranges > 1) {
            simt::launch((unsigned) plan.rows(), (unsigned) std::min(plan.op.size_v, 256), 0, [&] { turbo_combine(plan.op); });
        }
        const std::vector<float> out = result.read();
        fwrite(out.data(), sizeof(float), out.size(), stdout);
    }
    return 0;
}
