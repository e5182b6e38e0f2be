// What all types share: which card this is, into how many parts decoding splits the keys, and how they are joined.
#include "cuda/attention/launch.h"

#include <algorithm>

#include "cuda/attention/instantiate.cuh"
#include "cuda/attention/primitives.cuh"

namespace lmopt {
namespace cuda {
namespace {

constexpr int kWarpsPerBlock = 4;
constexpr int kMaxColumns = kHeadSizes[sizeof(kHeadSizes) / sizeof(kHeadSizes[0]) - 1] / kWarpSize;  // of a lane
// As many blocks of one warp as keep the memory of a multiprocessor busy.
constexpr int kSplitBlocksPerMultiprocessor = 4;

template <class T>
LMOPT_DEVICE T round_to(float number);
template <>
LMOPT_DEVICE Half round_to<Half>(float number) {
  return __float2half_rn(number);
}
template <>
LMOPT_DEVICE BFloat16 round_to<BFloat16>(float number) {
  return __float2bfloat16_rn(number);
}

// A warp for each query of each head. Weights of the parts are relative to the largest logsumexp.
template <class T>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarpSize)
    combine_kernel(const DeviceCall call, const SplitKeys split) {
  const int64_t num_rows = call.num_rows();
  const int64_t row = blockIdx.x * static_cast<int64_t>(kWarpsPerBlock) + threadIdx.x / kWarpSize;
  if (row >= num_rows) return;
  const int lane = threadIdx.x % kWarpSize;
  const auto [batch, head, query] = call.place_of(row);
  const float sink = call.sinks == nullptr ? -kInfinity : call.sinks[head];
  float largest = sink;
  for (int part = 0; part < split.num_splits; ++part) {
    largest = fmaxf(largest, split.logsumexp[part * num_rows + row]);
  }
  const float origin = largest == -kInfinity ? 0 : largest;
  float sum = exp2_approximately((sink - origin) * kLog2E);
  for (int part = 0; part < split.num_splits; ++part) {
    sum += exp2_approximately((split.logsumexp[part * num_rows + row] - origin) * kLog2E);
  }
  T* output = static_cast<T*>(call.output.data) + batch * call.output.batch_stride + head * call.output.head_stride +
      query * call.output.row_stride;
  float totals[kMaxColumns] = {};
  for (int part = 0; part < split.num_splits; ++part) {
    const int64_t row_of_part = part * num_rows + row;
    const float weight = exp2_approximately((split.logsumexp[row_of_part] - origin) * kLog2E);
#pragma unroll
    for (int i = 0; i < kMaxColumns; ++i) {
      const int column = lane + i * kWarpSize;
      if (column < call.head_size) totals[i] += weight * split.output[row_of_part * call.head_size + column];
    }
  }
#pragma unroll
  for (int i = 0; i < kMaxColumns; ++i) {
    const int column = lane + i * kWarpSize;
    if (column < call.head_size) output[column] = round_to<T>(sum == 0 ? 0 : totals[i] / sum);
  }
  if (lane == 0) call.logsumexp[row] = sum == 0 ? -kInfinity : origin + log2f(sum) * kLn2;
}

}  // namespace

int find_card(Card& card) {
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto ask = [&](cudaDeviceAttr attribute, int& answer) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&answer, attribute, device);
  };
  ask(cudaDevAttrComputeCapabilityMajor, major);
  ask(cudaDevAttrComputeCapabilityMinor, minor);
  ask(cudaDevAttrMultiProcessorCount, card.num_multiprocessors);
  card.compute_capability = 10 * major + minor;
  cudaFuncAttributes attributes{};
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, &combine_kernel<Half>);
  card.code_architecture = attributes.ptxVersion;
  return error;
}

int choose_num_splits(const DeviceCall& call, const Card& card) {
  if (call.num_queries > kMaxQueriesOfDecoding) return 0;
  int num_splits = 0;
  with_head_size(call.head_size, [&](auto head_size) {
    const ForwardShape shape = forward_shape(head_size, card.generation(), true);
    const int64_t num_rows = static_cast<int64_t>(call.num_heads) / call.num_key_heads * call.num_queries;
    const int64_t num_blocks =
        (num_rows + shape.num_rows() - 1) / shape.num_rows() * call.num_key_heads * call.batch_size;
    const int64_t num_steps = (call.num_keys + shape.num_keys - 1) / shape.num_keys;
    const int64_t wanted = (kSplitBlocksPerMultiprocessor * card.num_multiprocessors + num_blocks - 1) / num_blocks;
    const int64_t steps_of_split = (num_steps + std::max<int64_t>(1, wanted) - 1) / std::max<int64_t>(1, wanted);
    num_splits = static_cast<int>(steps_of_split == 0 ? 1 : (num_steps + steps_of_split - 1) / steps_of_split);
    return 0;
  });
  return num_splits;
}

int launch_forward(const DeviceCall& call, const Card& card, void* stream) {
  const auto launch = call.type == ElementType::float16 ? &float16::launch_forward : &bfloat16::launch_forward;
  return launch(call, nullptr, card, stream);
}

int launch_forward_split(const DeviceCall& call, const SplitKeys& split, const Card& card, void* stream) {
  const auto launch = call.type == ElementType::float16 ? &float16::launch_forward : &bfloat16::launch_forward;
  return launch(call, &split, card, stream);
}

int launch_combine(const DeviceCall& call, const SplitKeys& split, void* stream) {
  const dim3 grid(static_cast<unsigned>((call.num_rows() + kWarpsPerBlock - 1) / kWarpsPerBlock));
  const auto kernel = call.type == ElementType::float16 ? &combine_kernel<Half> : &combine_kernel<BFloat16>;
  return launch_kernel(kernel, grid, kWarpsPerBlock * kWarpSize, 0, stream, call, split);
}

const char* describe_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace cuda
}  // namespace lmopt
