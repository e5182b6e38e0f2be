// What the backward pass needs of each query before it begins, and the gradient of sinks.
#include "cuda/attention/instantiate.cuh"
#include "cuda/attention/launch.h"
#include "cuda/attention/primitives.cuh"
#include "cuda/attention/scores.cuh"

namespace lmopt {
namespace cuda {
namespace {

constexpr int kWarpsPerBlock = 4;
constexpr int kThreads = kWarpsPerBlock * kWarpSize;

LMOPT_DEVICE float sum_over_warp(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

// A warp for each query of each head.
template <class T>
__global__ void __launch_bounds__(kThreads)
    prepare_backward_kernel(const DeviceCall call, const DeviceGradients gradients) {
  const int64_t row = blockIdx.x * static_cast<int64_t>(kWarpsPerBlock) + threadIdx.x / kWarpSize;
  if (row >= call.num_rows()) return;
  const int lane = threadIdx.x % kWarpSize;
  const QueryPlace place = call.place_of(row);
  const auto row_of = [&](const DeviceTensor& tensor) {
    return static_cast<const T*>(tensor.data) + place.batch * tensor.batch_stride +
        place.head * tensor.head_stride + place.query * tensor.row_stride;
  };
  const T *output = row_of(call.output), *output_gradient = row_of(gradients.output_gradient);
  float sum = 0;
  for (int column = lane; column < call.head_size; column += kWarpSize) {
    sum += to_float(output[column]) * to_float(output_gradient[column]);
  }
  sum = sum_over_warp(sum);
  if (lane != 0) return;
  if (gradients.logsumexp_gradient != nullptr) sum -= gradients.logsumexp_gradient[row];
  const float logsumexp = call.logsumexp[row];
  gradients.deltas[row] = sum;
  // A sum that is infinite itself makes NaN of all weights, as in the reference; inf means that nothing is seen.
  const float factor = needs_scores(call) ? 1 : kLog2E;
  gradients.origins[row] =
      logsumexp == -kInfinity ? kInfinity : logsumexp == kInfinity ? logsumexp - logsumexp : logsumexp * factor;
}

// A block of threads for each head, which adds in the same order each time. A sink's weight times its gradient, which
// is that of a key with a value of 0.
__global__ void __launch_bounds__(kThreads)
    sinks_gradient_kernel(const DeviceCall call, const DeviceGradients gradients) {
  __shared__ float sums[kWarpsPerBlock];
  const int64_t head = blockIdx.x, num_rows = static_cast<int64_t>(call.batch_size) * call.num_queries;
  const bool has_scores = needs_scores(call);
  float sum = 0;
  for (int64_t i = threadIdx.x; i < num_rows; i += kThreads) {
    const int64_t row = call.row_of(i / call.num_queries, head, i % call.num_queries);
    const float origin = gradients.origins[row];
    const float exponent = exponent_above(has_scores, call.sinks[head], kLog2E, origin);
    if (origin != kInfinity) sum -= exp2_approximately(exponent) * gradients.deltas[row];
  }
  sum = sum_over_warp(sum);
  if (threadIdx.x % kWarpSize == 0) sums[threadIdx.x / kWarpSize] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kWarpsPerBlock; ++warp) sum += sums[warp];
  gradients.sinks[head] = sum;
}

}  // namespace

int launch_prepare_backward(const DeviceCall& call, const DeviceGradients& gradients, void* stream) {
  const dim3 grid(static_cast<unsigned>((call.num_rows() + kWarpsPerBlock - 1) / kWarpsPerBlock));
  const auto kernel =
      call.type == ElementType::float16 ? &prepare_backward_kernel<Half> : &prepare_backward_kernel<BFloat16>;
  return launch_kernel(kernel, grid, kThreads, 0, stream, call, gradients);
}

int launch_sinks_gradient(const DeviceCall& call, const DeviceGradients& gradients, void* stream) {
  return launch_kernel(&sinks_gradient_kernel, dim3(call.num_heads), kThreads, 0, stream, call, gradients);
}

int launch_backward(const DeviceCall& call, const DeviceGradients& gradients, const Card& card, void* stream) {
  const auto launch = call.type == ElementType::float16 ? &float16::launch_backward : &bfloat16::launch_backward;
  return launch(call, gradients, card, stream);
}

int launch_bias_gradient(const DeviceCall& call, const DeviceGradients& gradients, const Card& card, void* stream) {
  const auto launch =
      call.type == ElementType::float16 ? &float16::launch_bias_gradient : &bfloat16::launch_bias_gradient;
  return launch(call, gradients, card, stream);
}

}  // namespace cuda
}  // namespace lmopt
