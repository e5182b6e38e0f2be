// What the operator hands to the kernels of the fused step on CUDA: device pointers, already checked.
#pragma once

#include "optim/fused_step.h"

namespace lmopt {
namespace cuda {

struct DeviceFusedStep {
  FusedStep step;                                  // its own codebooks are the CPU's
  const float* codebooks[kMaxStatesPerParameter];  // null for states in float32
  float* scales;                                   // two per tensor, where step.block_sums are needed
};

// Launches the step; `stream` is a cudaStream_t. Returns null, or CUDA's words for what went wrong.
const char* fused_step(int rule, const DeviceFusedStep& step, void* stream);

}  // namespace cuda
}  // namespace lmopt
