// A stand-in for libcudart: nvcc's launch stubs and the host code of csrc/cuda/ call it, and it asks Python.
//
// It knows no rules of its own: launch.py answers what the simulated card allows, with CUDA's numbers of errors.
#include <cstddef>
#include <cstring>
#include <map>
#include <string>

namespace {

struct Dim3 {
  unsigned x, y, z;
};

// Each returns a cudaError_t.
struct Callbacks {
  int (*launch)(
      const char* kernel, const unsigned* grid, const unsigned* block, size_t dynamic_shared_bytes,
      size_t allowed_shared_bytes, void** arguments);
  int (*set_attribute)(const char* kernel, int attribute, int value);
  int (*get_device_attribute)(int attribute, int* value);
  int (*set_memory)(void* address, int value, size_t num_bytes);
  int (*add_buffer)(void* address, size_t num_bytes, int is_written);
};

struct Kernel {
  std::string name;
  size_t allowed_shared_bytes = 48 << 10;  // until cudaFuncSetAttribute raises it
};

struct LaunchConfiguration {
  Dim3 grid, block;
  size_t dynamic_shared_bytes;
  void* stream;
};

constexpr int kSuccess = 0, kInvalidDeviceFunction = 98, kUnknown = 999, kMaxDynamicSharedBytes = 8;

Callbacks callbacks;
LaunchConfiguration configuration;
int last_error = kSuccess;

std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> all;
  return all;
}

// As in CUDA, an error is returned and also remembered until cudaGetLastError.
int remember(int error) {
  if (error != kSuccess) last_error = error;
  return error;
}

int launch(const void* function, Dim3 grid, Dim3 block, void** arguments, size_t dynamic_shared_bytes) {
  const auto found = kernels().find(function);
  if (found == kernels().end()) return remember(kInvalidDeviceFunction);
  if (callbacks.launch == nullptr) return remember(kUnknown);
  const Kernel& kernel = found->second;
  return remember(callbacks.launch(
      kernel.name.c_str(), &grid.x, &block.x, dynamic_shared_bytes, kernel.allowed_shared_bytes, arguments));
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))
#define STAND_IN extern "C" __attribute__((visibility("hidden")))

EXPORTED void cuda_simulation_set_callbacks(const Callbacks* new_callbacks) {
  callbacks = new_callbacks == nullptr ? Callbacks{} : *new_callbacks;
  last_error = kSuccess;
  for (auto& entry : kernels()) entry.second.allowed_shared_bytes = Kernel{}.allowed_shared_bytes;
}

int cuda_simulation_add_buffer(void* address, size_t num_bytes, int is_written) {
  return callbacks.add_buffer == nullptr ? kUnknown : callbacks.add_buffer(address, num_bytes, is_written);
}

// What nvcc's generated code calls.

STAND_IN void** __cudaRegisterFatBinary(void* binary) { return new void*(binary); }
STAND_IN void __cudaRegisterFatBinaryEnd(void**) {}
STAND_IN void __cudaUnregisterFatBinary(void** handle) { delete handle; }
// Variables keep the values that the PTX gives them; host code of this project does not set any.
STAND_IN void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
STAND_IN void __cudaRegisterFunction(
    void**, const char* function, char*, const char* name, int, void*, void*, void*, void*, int*) {
  kernels()[function].name = name;
}
STAND_IN unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t dynamic_shared_bytes, void* stream) {
  configuration = {grid, block, dynamic_shared_bytes, stream};
  return 0;
}
STAND_IN int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* dynamic_shared_bytes, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *dynamic_shared_bytes = configuration.dynamic_shared_bytes;
  std::memcpy(stream, &configuration.stream, sizeof(void*));
  return kSuccess;
}
STAND_IN int __cudaGetKernel(void** kernel, const void* function) {
  *kernel = const_cast<void*>(function);
  return kSuccess;
}
STAND_IN int __cudaLaunchKernel(
    void* kernel, Dim3 grid, Dim3 block, void** arguments, size_t dynamic_shared_bytes, void*) {
  return launch(kernel, grid, block, arguments, dynamic_shared_bytes);
}

// What host code calls.

STAND_IN int cudaLaunchKernel(
    const void* function, Dim3 grid, Dim3 block, void** arguments, size_t dynamic_shared_bytes, void*) {
  return launch(function, grid, block, arguments, dynamic_shared_bytes);
}
STAND_IN int cudaFuncSetAttribute(const void* function, int attribute, int value) {
  const auto found = kernels().find(function);
  if (found == kernels().end()) return remember(kInvalidDeviceFunction);
  if (callbacks.set_attribute == nullptr) return remember(kUnknown);
  const int error = callbacks.set_attribute(found->second.name.c_str(), attribute, value);
  if (error == kSuccess && attribute == kMaxDynamicSharedBytes) found->second.allowed_shared_bytes = value;
  return remember(error);
}
STAND_IN int cudaGetDevice(int* device) {
  *device = 0;
  return kSuccess;
}
// The beginning of cudaFuncAttributes. The code is that of the simulated card.
struct FunctionAttributes {
  size_t shared_bytes, constant_bytes, local_bytes;
  int max_threads_per_block, num_registers, ptx_version, binary_version;
};

STAND_IN int cudaFuncGetAttributes(FunctionAttributes* attributes, const void* function) {
  constexpr int kCapabilityMajor = 75, kCapabilityMinor = 76;
  if (kernels().find(function) == kernels().end()) return remember(kInvalidDeviceFunction);
  if (callbacks.get_device_attribute == nullptr) return remember(kUnknown);
  int major = 0, minor = 0;
  int error = callbacks.get_device_attribute(kCapabilityMajor, &major);
  if (error == kSuccess) error = callbacks.get_device_attribute(kCapabilityMinor, &minor);
  attributes->ptx_version = attributes->binary_version = 10 * major + minor;
  return remember(error);
}

STAND_IN int cudaDeviceGetAttribute(int* value, int attribute, int) {
  return remember(
      callbacks.get_device_attribute == nullptr ? kUnknown : callbacks.get_device_attribute(attribute, value));
}
STAND_IN int cudaMemsetAsync(void* address, int value, size_t num_bytes, void*) {
  return remember(callbacks.set_memory == nullptr ? kUnknown : callbacks.set_memory(address, value, num_bytes));
}
STAND_IN int cudaPeekAtLastError() { return last_error; }
STAND_IN int cudaGetLastError() {
  const int error = last_error;
  last_error = kSuccess;
  return error;
}
STAND_IN const char* cudaGetErrorString(int error) {
  switch (error) {
    case kSuccess:
      return "no error";
    case 1:
      return "invalid argument";
    case 9:
      return "invalid configuration argument";
    case kInvalidDeviceFunction:
      return "invalid device function";
    case 701:
      return "too many resources requested for launch";
    default:
      return "unknown error of the simulation";
  }
}
