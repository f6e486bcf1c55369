// Kernels that are wrong, one a number: the emulator must see each, as tests/test_cuda.py says. 0 is right.

#include "cuda.h"

#include <cstdio>

SIMT_DYNAMIC_SHARED(float, dynamic);

// The sum of 128 values; what is wrong: a constant of the kernel.
template<int fault> static __global__ void sum(const float * x, float * y) {
    __shared__ float part[4];
    extern __shared__ float dynamic[];
    const int i = threadIdx.x, lane = i % 32;
    float     v = x[fault == 1 ? i + 1 : i]; // 1: one value too far
    for (int d = 16; d > 0; d /= 2) {
        if (fault == 2 && i == 5) { // 2: a lane that does not come
            continue;
        }
        v += __shfl_xor_sync(fault == 3 ? 0xffffu : ~0u, v, d); // 3: lanes that are not in their mask
    }
    if (lane == 0) {
        part[i/32] = v;
    }
    if (fault == 4 && i == 0) { // 4: not all at one barrier
        __syncthreads();
    } else if (fault != 5) { // 5: no barrier
        __syncthreads();
    }
    if (i == 0) {
        y[fault == 6] = part[0] + part[1] + part[2] + part[3]; // 6: behind the end
    }
    if (fault == 7 && i < 32) { // 7: a shuffle where a barrier is needed
        dynamic[lane] = v;
        v = __shfl_xor_sync(~0u, v, 1);
        y[0] = i == 0 ? dynamic[1] : v;
    }
    if (fault == 8 && i == 0) { // 8: shared memory that nothing has written
        y[0] = dynamic[7];
    }
    if (fault == 9 && i == 0) { // 9: more dynamic shared memory than was asked for
        dynamic[32] = v;
    }
    if (fault == 10 && i == 0) { // 10: four bytes from an address of two
        y[0] += *(const float *) ((const char *) x + 2);
    }
    if (fault == 11) { // 11: an input is written
        const_cast<float *>(x)[i] = v;
    }
    if (fault == 12 && lane == 0) { // 12: every warp writes the same place
        y[0] = v;
    }
    if (fault == 13 && i == 0) { // 13: without end
        char pit[300*1024];
        for (char & c : pit) {
            c = (char) i;
        }
        y[0] += pit[(unsigned) v % 1000];
    }
    if (fault == 14 && i == 0) { // 14: reads what it should have written
        y[0] = y[1];
    }
}

template<int fault> static int run(int which) {
    if constexpr (fault < 0) {
        return 2;
    } else if (which != fault) {
        return run<fault - 1>(which);
    } else {
        std::vector<float> values(128);
        for (int i = 0; i < 128; ++i) {
            values[(size_t) i] = (float) i;
        }
        const simt::input<float> x(values);
        for (simt::schedule order : simt::schedules) {
            simt::set_schedule(order, 3);
            simt::output<float> y(fault == 14 ? 2 : 1);
            simt::launch(1, 128, 32*sizeof(float), [&] { sum<fault>(x, y); });
            if (y.read()[0] != 128*127/2) {
                printf("wrong sum\n");
                return 1;
            }
        }
        printf("right\n");
        return 0;
    }
}

int main(int argc, char ** argv) {
    return argc == 2 ? run<14>(atoi(argv[1])) : 2;
}
