// The attention kernel alone, for whatever instruction set this is compiled for: reads problems from standard input
// and writes their results to standard output, as test_attention.py has them.

#include "attention_problem.h"

#include "cpu/turbo-ops.h"

// one thread
static int next_chunk;
void ggml_barrier(ggml_threadpool *) {}
void ggml_threadpool_chunk_set(ggml_threadpool *, int value) { next_chunk = value; }
int  ggml_threadpool_chunk_add(ggml_threadpool *, int value) { return (next_chunk += value) - value; }

ggml::cpu::tensor_traits::~tensor_traits() = default;

int main() {
    problem::numbers numbers;
    while (read(&numbers, sizeof(numbers))) {
        problem p(numbers);
        ggml::cpu::tensor_traits * kernel = turbo_attention_claims(&p.out);
        size_t size = 0;
        if (!kernel || !kernel->work_size(1, &p.out, size)) {
            fprintf(stderr, "the kernel does not take this problem\n");
            return 1;
        }
        std::vector<char> work(size, (char) 0xff); // NaN in every type: nothing may be read before it is written
        ggml_compute_params params = {};
        params.nth   = 1;
        params.wsize = size;
        params.wdata = work.data();
        kernel->compute_forward(&params, &p.out);
        fwrite(p.out.data, 1, p.out.memory.size(), stdout);
    }
    return 0;
}
