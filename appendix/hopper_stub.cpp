// What the host part of ttt_kernel.cu asks of CUDA's runtime and driver, answered without either (nvcc
// -cudart none): a launch goes to a callback of appendix/hopper.py, a tensor map holds what it was made of.
#include <cstdint>
#include <cstring>
#include <map>
#include <string>

struct dim3 { unsigned x, y, z; };
using Launch = int (*)(const char *name, const unsigned *grid, unsigned threads, const void *given, size_t);
static Launch launch;
struct Kernel { std::string name; int shared; };              // shared: what it was allowed to ask for
static Kernel &kernel_at(const void *host) {                  // known by the address of its host function
    static std::map<const void *, Kernel> kernels;
    return kernels[host];
}
static struct { dim3 grid, block; size_t shared; void *stream; } call;
static int last_error;

// What cuTensorMapEncodeTiled would refuse is refused here as well.
struct TensorMap { uint64_t magic, address, dims[5], strides[4]; uint32_t box[5]; uint16_t rank, swizzle; };
static int encode_tiled(void *map, int type, uint32_t rank, void *address, const uint64_t *dims,
                        const uint64_t *strides, const uint32_t *box, const uint32_t *steps, int interleave,
                        int swizzle, int, int fill) {
    static const unsigned widest[] = {~0u, 32, 64, 128};
    if (type != 9 || rank < 3 || rank > 5 || (uint64_t)address % 16 || (uint64_t)map % 64) return 1; // bf16
    if (interleave || fill || swizzle > 3 || box[0] * 2 % 16 || box[0] * 2 > widest[swizzle]) return 1;
    TensorMap made{0x70616d726f736e74, (uint64_t)address};
    for (unsigned i = 0; i < rank; i++) {
        if (!dims[i] || dims[i] > 1ull << 32 || !box[i] || box[i] > 256 || steps[i] != 1) return 1;
        if (i && (strides[i - 1] % 16 || strides[i - 1] >= 1ull << 40)) return 1;
        made.dims[i] = dims[i], made.box[i] = box[i];
        if (i) made.strides[i - 1] = strides[i - 1];
    }
    made.rank = rank, made.swizzle = swizzle;
    memset(map, 0, 128), memcpy(map, &made, sizeof made);
    return 0;
}
static int error_string(int, const char **text) { *text = "an error of the driver"; return 0; }

extern "C" {
__attribute__((visibility("default"))) void set_launch(Launch function) { launch = function; }
void **__cudaRegisterFatBinary(void *) { static void *none; return &none; }
void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}
void __cudaRegisterFunction(void **, const char *host, char *, const char *name, int, void *, void *, void *,
                            void *, int *) {
    kernel_at(host).name = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    call = {grid, block, shared, stream};
    return 0;
}
int __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void **stream) {
    *grid = call.grid, *block = call.block, *shared = call.shared, *stream = call.stream;
    return 0;
}
int __cudaGetKernel(const void **kernel, const void *host) { *kernel = host; return 0; }
int __cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **parameters, size_t shared, void *) {
    if (shared > 48 * 1024 && kernel_at(kernel).shared < (int)shared) return last_error = 1;
    return last_error = launch(kernel_at(kernel).name.c_str(), &grid.x, block.x, parameters[0], shared);
}
int cudaFuncSetAttribute(const void *kernel, int what, int value) {
    if (what != 8 || value > 227 * 1024) return last_error = 1;   // 8: MaxDynamicSharedMemorySize
    kernel_at(kernel).shared = value;
    return 0;
}
int cudaGetLastError() { const int error = last_error; last_error = 0; return error; }
const char *cudaGetErrorString(int) { return "an error of the runtime"; }
int cudaPointerGetAttributes(void *attributes, const void *) {        // of every pointer: it is device memory
    memset(attributes, 0, 8), *(int *)attributes = 2;
    return 0;
}
int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned, uint64_t, int *found) {
    *function = !strcmp(name, "cuTensorMapEncodeTiled") ? (void *)encode_tiled
              : !strcmp(name, "cuGetErrorString") ? (void *)error_string : nullptr;
    *found = !*function;
    return 0;
}
}
