// Launches the forward kernels of one type; included once for each.
#pragma once

#include <type_traits>

#include "cuda/attention/forward.cuh"
#include "cuda/attention/instantiate.cuh"
#include "cuda/attention/launch.h"

namespace lmopt {
namespace cuda {

template <class T, bool kSplitsKeys>
int launch_forward_of(const DeviceCall& call, const SplitKeys& split, const Card& card, void* stream) {
  return with_head_size(call.head_size, [&](auto head_size) {
    const ForwardShape shape = forward_shape(head_size, card.generation(), kSplitsKeys);
    const int num_heads = kSplitsKeys ? call.num_key_heads : call.num_heads;
    const int64_t num_rows = static_cast<int64_t>(call.num_heads) / num_heads * call.num_queries;
    const int64_t num_row_blocks = (num_rows + shape.num_rows() - 1) / shape.num_rows();
    const auto num_blocks = static_cast<unsigned>(num_row_blocks * num_heads * call.batch_size);
    const dim3 grid(num_blocks, kSplitsKeys ? split.num_splits : 1);
    return launch_kernel(
        &attention_forward_kernel<T, head_size, kSplitsKeys>, grid, shape.num_threads(), shape.shared_bytes(head_size),
        stream, call, split);
  });
}

template <class T>
int launch_forward_of(const DeviceCall& call, const SplitKeys* split, const Card& card, void* stream) {
  if (split == nullptr) return launch_forward_of<T, false>(call, SplitKeys{}, card, stream);
  return launch_forward_of<T, true>(call, *split, card, stream);
}

}  // namespace cuda
}  // namespace lmopt
