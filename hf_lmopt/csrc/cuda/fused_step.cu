// The fused optimizer step on CUDA: the rules of optim/rules.h over many tensors per launch.
//
// Checked at PTX level only: the library does not contain it yet. Left out, and refused: 8-bit states, and what needs
// a sum over a tensor first (cautious masking, MARS).
#define LMOPT_INSTRUCTION_SET cuda

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "optim/fused_step.h"
#include "optim/rules.h"

namespace lmopt {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTensorsPerLaunch = 32;  // their description has to fit into the 4 KB of a kernel's arguments

struct Launch {
  FusedTensor tensors[kTensorsPerLaunch];
  int num_tensors;
  float l2, shrink_before, shrink_after;
};
static_assert(sizeof(Launch) <= 4000, "the arguments of a kernel are limited to 4 KB");

__device__ float load(ElementType type, const void* data, int64_t i) {
  switch (type) {
    case ElementType::bfloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
    case ElementType::float16:
      return __half2float(static_cast<const __half*>(data)[i]);
    default:
      return static_cast<const float*>(data)[i];
  }
}

__device__ void store(ElementType type, void* data, int64_t i, float value) {
  switch (type) {
    case ElementType::bfloat16:
      static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(value);
      break;
    case ElementType::float16:
      static_cast<__half*>(data)[i] = __float2half_rn(value);
      break;
    default:
      static_cast<float*>(data)[i] = value;
  }
}

template <class AnyRule>
__device__ void update_element(const AnyRule& rule, const Launch& launch, const FusedTensor& tensor, int64_t i) {
  const float parameter = load(tensor.parameter_type, tensor.parameter, i);
  const float gradient = load(tensor.gradient_type, tensor.gradient, i) + launch.l2 * parameter;
  float states[AnyRule::num_states > 0 ? AnyRule::num_states : 1];
  for (int k = 0; k < AnyRule::num_states; ++k) states[k] = static_cast<const float*>(tensor.states[k])[i];
  const float change = rule(gradient, states);
  for (int k = 0; k < AnyRule::num_states; ++k) static_cast<float*>(tensor.states[k])[i] = states[k];
  const float updated = (parameter * launch.shrink_before - change) * launch.shrink_after;
  store(tensor.parameter_type, tensor.parameter, i, updated);
}

// One thread block per kBlock elements, numbered through the tensors of the launch.
template <class AnyRule>
__global__ void __launch_bounds__(kThreads) fused_step_kernel(const AnyRule rule, const Launch launch) {
  const int64_t block = launch.tensors[0].first_block + blockIdx.x;
  int index = 0;
  while (index + 1 < launch.num_tensors && launch.tensors[index + 1].first_block <= block) ++index;
  const FusedTensor& tensor = launch.tensors[index];
  const int64_t begin = (block - tensor.first_block) * kBlock;
  const int64_t end = begin + kBlock < tensor.numel ? begin + kBlock : tensor.numel;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) update_element(rule, launch, tensor, i);
}

template <class AnyRule>
cudaError_t run_rule(const FusedStep& step, cudaStream_t stream) {
  AnyRule rule{};
  memcpy(static_cast<void*>(&rule), step.coefficients, num_coefficients<AnyRule>() * sizeof(float));
  for (int64_t first = 0; first < step.num_tensors; first += kTensorsPerLaunch) {
    Launch launch{{}, 0, step.l2, step.shrink_before, step.shrink_after};
    int64_t blocks = 0;
    while (launch.num_tensors < kTensorsPerLaunch && first + launch.num_tensors < step.num_tensors) {
      const FusedTensor& tensor = step.tensors[first + launch.num_tensors];
      launch.tensors[launch.num_tensors++] = tensor;
      blocks += num_blocks(tensor);
    }
    if (blocks > 0) fused_step_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(rule, launch);
  }
  return cudaGetLastError();
}

template <>
cudaError_t run_rule<Mars>(const FusedStep&, cudaStream_t) {
  return cudaErrorNotSupported;
}

const char* reason_to_refuse(const FusedStep& step) {
  if (step.cautious) return "cautious=True is not written for CUDA. It needs a sum over each tensor. Use foreach.";
  for (int64_t i = 0; i < step.num_tensors; ++i) {
    for (const float* absmax : step.tensors[i].absmax) {
      if (absmax != nullptr) return "8-bit states are not written for CUDA. States must be float32. Use foreach.";
    }
  }
  return nullptr;
}

}  // namespace

// Returns null, or why nothing was done.
const char* fused_step(int rule, const FusedStep& step, cudaStream_t stream) {
  if (const char* reason = reason_to_refuse(step)) return reason;
  using RunRule = cudaError_t (*)(const FusedStep&, cudaStream_t);
#define LMOPT_RUN_RULE(name, AnyRule) &run_rule<AnyRule>,
  static constexpr RunRule run[] = {LMOPT_FOR_EACH_RULE(LMOPT_RUN_RULE)};
#undef LMOPT_RUN_RULE
  if (run[rule] == &run_rule<Mars>) return "rule='mars' is not written for CUDA. It needs a norm first. Use foreach.";
  const cudaError_t error = run[rule](step, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace lmopt
