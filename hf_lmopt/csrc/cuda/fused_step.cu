// The fused optimizer step on CUDA: the rules of optim/rules.h over many tensors per launch, in one pass.
//
// A thread block takes kBlock elements of a tensor; blocks are numbered through all tensors of a launch. Cautious
// masking and MARS need a sum over each tensor first. It is taken per block, and then by one thread block for each
// tensor in an order that depends on its size alone: results are the same bits each time, without atomics.
#define LMOPT_INSTRUCTION_SET cuda

#include "cuda/fused_step.h"

#include <cstring>

#include "cuda/rows.cuh"
#include "optim/rules.h"

namespace lmopt {
namespace cuda {
namespace {

constexpr int kTensorsPerLaunch = 32;  // their description has to fit into the 4 KB of a kernel's arguments

struct Launch {
  FusedTensor tensors[kTensorsPerLaunch];
  const float* codebooks[kMaxStatesPerParameter];
  double* block_sums;        // one per block of the step
  float* correction_scales;  // one per tensor of the launch; null for rules that clip no correction
  float* cautious_scales;    // likewise; null if the step is not masked
  int num_tensors;
  float l2, shrink_before, shrink_after;
};
static_assert(sizeof(Launch) <= 4000, "the arguments of a kernel are limited to 4 KB");

// ---- One block ------------------------------------------------------------------------------------------------------

// The tensor of this thread block, by its index in the launch.
__device__ int find_tensor(const Launch& launch, int64_t block) {
  int index = 0;
  while (index + 1 < launch.num_tensors && launch.tensors[index + 1].first_block <= block) ++index;
  return index;
}

__device__ int64_t block_of_step(const Launch& launch) {
  return launch.tensors[0].first_block + blockIdx.x;
}

__device__ Position position_of(const FusedTensor& tensor, int64_t block) {
  const int64_t offset = (block - tensor.first_block) * kBlock, left = tensor.numel - offset;
  return {offset, static_cast<int>(left < kBlock ? left : kBlock)};
}

template <class AnyRule>
__device__ AnyRule with_scale(AnyRule rule, const Launch&, int) {
  return rule;
}

__device__ Mars with_scale(Mars rule, const Launch& launch, int index) {
  rule.correction_scale = launch.correction_scales[index];
  return rule;
}

// An array of no elements is none.
template <int num_states>
constexpr int kArrayLength = num_states > 0 ? num_states : 1;

// Parameter, gradient with its penalty, and states of the elements of a thread.
template <int num_states>
struct Elements {
  Row parameter, gradient;
  Row states[kArrayLength<num_states>];

  __device__ void load(const Launch& launch, const FusedTensor& tensor, const Position& at, QuantizedRows* quantized) {
    for (int k = 0; k < num_states; ++k) {
      if (tensor.absmax[k] != nullptr) quantized[k].fill(launch.codebooks[k]);
    }
    __syncthreads();
    load_row(tensor.parameter_type, tensor.parameter, at, parameter);
    load_row(tensor.gradient_type, tensor.gradient, at, gradient);
#pragma unroll
    for (int k = 0; k < num_states; ++k) {
      if (tensor.absmax[k] == nullptr) {
        load_numbers<float>(tensor.states[k], at, states[k]);
      } else {
        quantized[k].load(static_cast<const uint8_t*>(tensor.states[k]), tensor.absmax[k], at, states[k]);
      }
    }
#pragma unroll
    for (int j = 0; j < kRows; ++j) gradient[j] += launch.l2 * parameter[j];
  }

  __device__ void store(const FusedTensor& tensor, const Position& at, QuantizedRows* quantized) const {
    store_row(tensor.parameter_type, tensor.parameter, at, parameter);
#pragma unroll
    for (int k = 0; k < num_states; ++k) {
      if (tensor.absmax[k] == nullptr) {
        store_numbers<float>(tensor.states[k], at, states[k]);
      } else {
        quantized[k].store(static_cast<uint8_t*>(tensor.states[k]), tensor.absmax[k], at, states[k]);
      }
    }
  }

  // The step of one element, whose states are updated.
  template <class AnyRule>
  __device__ float step(const AnyRule& rule, int row) {
    float of_element[kArrayLength<num_states>];
#pragma unroll
    for (int k = 0; k < num_states; ++k) of_element[k] = states[k][row];
    const float change = rule(gradient[row], of_element);
#pragma unroll
    for (int k = 0; k < num_states; ++k) states[k][row] = of_element[k];
    return change;
  }
};

// ---- Sums over tensors ----------------------------------------------------------------------------------------------

// The sum over the threads of a block, in one order; thread 0 has it.
__device__ double sum_over_threads(double value) {
  __shared__ double sums_of_warps[kWarps];
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  if (threadIdx.x % 32 == 0) sums_of_warps[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0.0;
  for (int warp = 0; warp < kWarps; ++warp) sum += sums_of_warps[warp];
  return sum;
}

// Whether the step of an element has the sign of its gradient.
struct CountAgreeing {
  static constexpr bool needs_scale = true;  // of the correction

  template <class AnyRule, class AnyElements>
  __device__ static double term(const AnyRule& rule, AnyElements& elements, int row) {
    return elements.step(rule, row) * elements.gradient[row] > 0.0f ? 1.0 : 0.0;
  }
};

struct SumCorrectedSquares {
  static constexpr bool needs_scale = false;  // which it is for

  template <class AnyRule, class AnyElements>
  __device__ static double term(const AnyRule& rule, AnyElements& elements, int row) {
    float states[AnyRule::num_states];
#pragma unroll
    for (int k = 0; k < AnyRule::num_states; ++k) states[k] = elements.states[k][row];
    const double corrected = rule.corrected_gradient(elements.gradient[row], states);
    return __dmul_rn(corrected, corrected);  // exact, for a number that was a float: a fused addition gains nothing
  }
};

template <class Sum, class AnyRule>
__global__ void __launch_bounds__(kThreads) sum_blocks_kernel(const AnyRule rule, const Launch launch) {
  __shared__ QuantizedRows quantized[kArrayLength<AnyRule::num_states>];
  const int64_t block = block_of_step(launch);
  const int index = find_tensor(launch, block);
  const FusedTensor& tensor = launch.tensors[index];
  const Position at = position_of(tensor, block);
  Elements<AnyRule::num_states> elements;
  elements.load(launch, tensor, at, quantized);
  const AnyRule scaled = Sum::needs_scale ? with_scale(rule, launch, index) : rule;
  double sum = 0.0;
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    if (at.has(j)) sum += Sum::term(scaled, elements, j);
  }
  sum = sum_over_threads(sum);
  if (threadIdx.x == 0) launch.block_sums[block] = sum;
}

// The sum of this thread block's tensor over its blocks; thread 0 has it.
__device__ double sum_of_tensor(const Launch& launch) {
  const FusedTensor& tensor = launch.tensors[blockIdx.x];
  const double* block_sums = launch.block_sums + tensor.first_block;
  const int64_t blocks = (tensor.numel + kBlock - 1) / kBlock;
  double sum = 0.0;
  for (int64_t block = threadIdx.x; block < blocks; block += kThreads) sum += block_sums[block];
  return sum_over_threads(sum);
}

// One thread block per tensor.
__global__ void __launch_bounds__(kThreads) correction_scales_kernel(const Launch launch, float max_norm) {
  const double norm = sqrt(sum_of_tensor(launch));
  const float scale = norm > max_norm ? static_cast<float>(max_norm / norm) : 1.0f;
  if (threadIdx.x == 0) launch.correction_scales[blockIdx.x] = scale;
}

__global__ void __launch_bounds__(kThreads) cautious_scales_kernel(const Launch launch) {
  const double count = sum_of_tensor(launch);
  const double numel = static_cast<double>(launch.tensors[blockIdx.x].numel);
  if (threadIdx.x == 0) launch.cautious_scales[blockIdx.x] = static_cast<float>(numel / (count + 1.0));
}

// ---- The step -------------------------------------------------------------------------------------------------------

template <class AnyRule>
__global__ void __launch_bounds__(kThreads) fused_step_kernel(const AnyRule rule, const Launch launch) {
  __shared__ QuantizedRows quantized[kArrayLength<AnyRule::num_states>];
  const int64_t block = block_of_step(launch);
  const int index = find_tensor(launch, block);
  const FusedTensor& tensor = launch.tensors[index];
  const Position at = position_of(tensor, block);
  const bool cautious = launch.cautious_scales != nullptr;
  const float cautious_scale = cautious ? launch.cautious_scales[index] : 1.0f;
  const AnyRule scaled = with_scale(rule, launch, index);
  Elements<AnyRule::num_states> elements;
  elements.load(launch, tensor, at, quantized);
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    float change = elements.step(scaled, j);
    // Written so that a NaN is kept.
    if (cautious) change = change * elements.gradient[j] <= 0.0f ? 0.0f : change * cautious_scale;
    elements.parameter[j] = (elements.parameter[j] * launch.shrink_before - change) * launch.shrink_after;
  }
  elements.store(tensor, at, quantized);
}

// ---- Launches -------------------------------------------------------------------------------------------------------

// The next tensors of a step, as many as a launch takes.
Launch describe_launch(const DeviceFusedStep& all, int64_t first, bool clips_correction) {
  const FusedStep& step = all.step;
  Launch launch{};
  const int64_t left = step.num_tensors - first;
  launch.num_tensors = static_cast<int>(left < kTensorsPerLaunch ? left : kTensorsPerLaunch);
  std::memcpy(launch.tensors, step.tensors + first, launch.num_tensors * sizeof(FusedTensor));
  std::memcpy(launch.codebooks, all.codebooks, sizeof(launch.codebooks));
  launch.block_sums = step.block_sums;
  if (clips_correction) launch.correction_scales = all.scales + first;
  if (step.cautious) launch.cautious_scales = all.scales + step.num_tensors + first;
  launch.l2 = step.l2;
  launch.shrink_before = step.shrink_before;
  launch.shrink_after = step.shrink_after;
  return launch;
}

template <class AnyRule>
void run_launch(const AnyRule& rule, const Launch& launch, cudaStream_t stream) {
  int64_t blocks = 0;
  for (int i = 0; i < launch.num_tensors; ++i) blocks += num_blocks(launch.tensors[i]);
  if (blocks == 0) return;
  const auto grid = static_cast<unsigned>(blocks), tensors = static_cast<unsigned>(launch.num_tensors);
  if constexpr (AnyRule::clips_correction) {
    sum_blocks_kernel<SumCorrectedSquares><<<grid, kThreads, 0, stream>>>(rule, launch);
    correction_scales_kernel<<<tensors, kThreads, 0, stream>>>(launch, rule.max_norm);
  }
  if (launch.cautious_scales != nullptr) {
    sum_blocks_kernel<CountAgreeing><<<grid, kThreads, 0, stream>>>(rule, launch);
    cautious_scales_kernel<<<tensors, kThreads, 0, stream>>>(launch);
  }
  fused_step_kernel<<<grid, kThreads, 0, stream>>>(rule, launch);
}

template <class AnyRule>
void run_rule(const DeviceFusedStep& step, cudaStream_t stream) {
  AnyRule rule{};
  std::memcpy(static_cast<void*>(&rule), step.step.coefficients, num_coefficients<AnyRule>() * sizeof(float));
  for (int64_t first = 0; first < step.step.num_tensors; first += kTensorsPerLaunch) {
    run_launch(rule, describe_launch(step, first, AnyRule::clips_correction), stream);
  }
}

}  // namespace

const char* fused_step(int rule, const DeviceFusedStep& step, void* stream) {
  using RunRule = void (*)(const DeviceFusedStep&, cudaStream_t);
#define LMOPT_RUN_RULE(name, AnyRule) &run_rule<AnyRule>,
  static constexpr RunRule run[] = {LMOPT_FOR_EACH_RULE(LMOPT_RUN_RULE)};
#undef LMOPT_RUN_RULE
  run[rule](step, static_cast<cudaStream_t>(stream));
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace lmopt
