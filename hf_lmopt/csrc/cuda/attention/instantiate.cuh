// From head sizes that are known when a kernel is launched to those that kernels are compiled for.
#pragma once

#include <cuda_runtime.h>

#include "cuda/attention/shapes.h"

namespace lmopt {
namespace cuda {

constexpr int kMaxSharedBytesUnasked = 48 << 10;

// Calls launch(std::integral_constant) with the smallest head size of the table that is large enough.
template <class Launch, int kIndex = 0>
int with_head_size(int head_size, const Launch& launch) {
  constexpr int kNumSizes = sizeof(kHeadSizes) / sizeof(kHeadSizes[0]);
  if constexpr (kIndex == kNumSizes) {
    return cudaErrorInvalidValue;  // the operator has refused it
  } else {
    constexpr int kSize = kHeadSizes[kIndex];
    if (head_size <= kSize) return launch(std::integral_constant<int, kSize>{});
    return with_head_size<Launch, kIndex + 1>(head_size, launch);
  }
}

template <class... Parameters, class... Arguments>
int launch_kernel(
    void (*kernel)(Parameters...), dim3 grid, int num_threads, int shared_bytes, void* stream,
    const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0) return cudaSuccess;
  if (shared_bytes > kMaxSharedBytesUnasked) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, num_threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace lmopt
