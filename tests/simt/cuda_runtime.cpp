// Stands in for the CUDA run time under objects that nvcc has made, so that llama.cpp's own CUDA back end runs with
// kernels in the emulator: one device, whose memory is the host's; everything is done when it is asked for.

#include <cuda_runtime_api.h>

#include <cxxabi.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

// cuda_device.cpp: runs a kernel that is called so, or returns false.
bool simt_run(const std::string & name, const unsigned (&grid)[3], const unsigned (&block)[3], size_t shared,
              void ** arguments);

namespace {

struct launch {
    dim3   grid, block;
    size_t shared;
} pushed;

std::map<const void *, std::string> & kernels() { // there before the first registration
    static std::map<const void *, std::string> names;
    return names;
}

// turbo_encode<4> of _Z12turbo_encodeILi4EEv12turbo_tensor...
std::string short_name(const char * mangled) {
    int         status = 0;
    char *      text = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
    std::string name = text ? text : mangled;
    free(text);
    name = name.substr(name.rfind("void ", 0) == 0 ? 5 : 0);
    return name.substr(0, name.find('('));
}

cudaError_t allocate(void ** p, size_t bytes) {
    *p = aligned_alloc(256, (bytes + 255)/256*256 + 256);
    memset(*p, 0xfb, bytes);
    return cudaSuccess;
}

} // namespace

extern "C" {

// ---- what nvcc calls ----

void ** __cudaRegisterFatBinary(void *)     { static void * handle; return &handle; }
void    __cudaRegisterFatBinaryEnd(void **) {}
void    __cudaUnregisterFatBinary(void **)  {}
void    __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int) {}
void    __cudaRegisterFunction(void **, const char * host, char *, const char * name, int, void *, void *, void *,
                               void *, int *) {
    kernels()[host] = short_name(name);
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *) {
    pushed = { grid, block, shared };
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 * grid, dim3 * block, size_t * shared, void * stream) {
    *grid   = pushed.grid;
    *block  = pushed.block;
    *shared = pushed.shared;
    *(void **) stream = nullptr;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t * kernel, const void * host) {
    *kernel = (cudaKernel_t) host;
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void ** arguments, size_t shared,
                               cudaStream_t) {
    const std::string & name = kernels()[(const void *) kernel];
    if (!simt_run(name, { grid.x, grid.y, grid.z }, { block.x, block.y, block.z }, shared, arguments)) {
        fprintf(stderr, "simt: %s is launched, and cuda_device.cpp does not have it\n", name.c_str());
        abort();
    }
    return cudaSuccess;
}

// ---- the device ----

cudaError_t cudaGetDeviceCount(int * n)                 { *n = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int * device)                 { *device = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int)                          { return cudaSuccess; }
cudaError_t cudaSetDeviceFlags(unsigned)                { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize()                     { return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int * can, int, int) { *can = 0; return cudaSuccess; }
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned)   { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int * value, cudaDeviceAttr, int) { *value = 0; return cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char * id, int bytes, int) {
    snprintf(id, (size_t) bytes, "0000:00:00.0");
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp * p, int) {
    *p = {};
    snprintf(p->name, sizeof(p->name), "emulator");
    p->major                    = 8;
    p->minor                    = 6;
    p->totalGlobalMem           = (size_t) 8 << 30;
    p->multiProcessorCount      = 4;
    p->warpSize                 = 32;
    p->maxThreadsPerBlock       = 1024;
    p->sharedMemPerBlock        = 48 << 10;
    p->sharedMemPerBlockOptin   = 99 << 10;
    p->sharedMemPerMultiprocessor = 100 << 10;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int) { return cudaSuccess; }
const char * cudaGetErrorString(cudaError_t)            { return "an error of the emulator"; }
cudaError_t  cudaGetLastError()                         { return cudaSuccess; }

// ---- memory ----

cudaError_t cudaMalloc(void ** p, size_t bytes)         { return allocate(p, bytes); }
cudaError_t cudaMallocManaged(void ** p, size_t bytes, unsigned) { return allocate(p, bytes); }
cudaError_t cudaMallocHost(void ** p, size_t bytes)     { return allocate(p, bytes); }
cudaError_t cudaFree(void * p)                          { free(p); return cudaSuccess; }
cudaError_t cudaFreeHost(void * p)                      { free(p); return cudaSuccess; }
cudaError_t cudaHostRegister(void *, size_t, unsigned)  { return cudaSuccess; }
cudaError_t cudaHostUnregister(void *)                  { return cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t * available, size_t * total) {
    *available = *total = (size_t) 8 << 30;
    return cudaSuccess;
}
cudaError_t cudaMemset(void * p, int value, size_t n)   { memset(p, value, n); return cudaSuccess; }
cudaError_t cudaMemsetAsync(void * p, int value, size_t n, cudaStream_t) { memset(p, value, n); return cudaSuccess; }
cudaError_t cudaMemcpyAsync(void * to, const void * from, size_t n, cudaMemcpyKind, cudaStream_t) {
    memmove(to, from, n);
    return cudaSuccess;
}
cudaError_t cudaMemcpyPeerAsync(void * to, int, const void * from, int, size_t n, cudaStream_t) {
    memmove(to, from, n);
    return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void * to, size_t to_pitch, const void * from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t) {
    for (size_t i = 0; i < height; ++i) {
        memmove((char *) to + i*to_pitch, (const char *) from + i*from_pitch, width);
    }
    return cudaSuccess;
}

// ---- streams and events: there is nothing to wait for ----

cudaError_t cudaStreamCreateWithFlags(cudaStream_t * s, unsigned)        { *s = nullptr; return cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t)                              { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t)                          { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned)     { return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t * e, unsigned)          { *e = nullptr; return cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t)                                { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t)                   { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t)                            { return cudaSuccess; }

} // extern "C"
