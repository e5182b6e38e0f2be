// Launches the backward kernels of one type; included once for each.
#pragma once

#include <type_traits>

#include "cuda/attention/backward.cuh"
#include "cuda/attention/bias_gradient.cuh"
#include "cuda/attention/instantiate.cuh"
#include "cuda/attention/launch.h"

namespace lmopt {
namespace cuda {

template <class T, int kHeadSize, GradientOf kOf>
int launch_gradient_of(const DeviceCall& call, const DeviceGradients& gradients, const Card& card, void* stream) {
  constexpr bool kRowsAreKeys = kOf != GradientOf::query;
  const BackwardShape shape = backward_shape(kOf, kHeadSize, card.generation());
  const int64_t num_rows = kRowsAreKeys ? call.num_keys : call.num_queries;
  const int64_t num_heads = kRowsAreKeys ? call.num_key_heads : call.num_heads;
  const int64_t num_row_blocks = (num_rows + shape.num_outer_rows() - 1) / shape.num_outer_rows();
  const dim3 grid(static_cast<unsigned>(num_row_blocks * num_heads * call.batch_size));
  return launch_kernel(
      &attention_backward_kernel<T, kHeadSize, kOf>, grid, shape.num_threads(), shape.shared_bytes(kHeadSize), stream,
      call, gradients);
}

template <class T, int kHeadSize, GradientOf... kOfs>
int launch_gradients_of(const DeviceCall& call, const DeviceGradients& gradients, const Card& card, void* stream) {
  int error = cudaSuccess;
  const auto launch = [&](bool is_used, auto launch_gradient) {
    if (is_used && error == cudaSuccess) error = launch_gradient(call, gradients, card, stream);
  };
  (launch(uses_gradient_kernel(kOfs, kHeadSize, card.generation()), &launch_gradient_of<T, kHeadSize, kOfs>), ...);
  return error;
}

template <class T>
int launch_backward_of(const DeviceCall& call, const DeviceGradients& gradients, const Card& card, void* stream) {
  return with_head_size(call.head_size, [&](auto head_size) -> int {
    constexpr int kHeadSize = head_size;
    if constexpr (separates_key_and_value(kHeadSize, Generation::turing)) {
      return launch_gradients_of<
          T, kHeadSize, GradientOf::query, GradientOf::key, GradientOf::value, GradientOf::key_and_value>(
          call, gradients, card, stream);
    } else {
      return launch_gradients_of<T, kHeadSize, GradientOf::query, GradientOf::key_and_value>(call, gradients, card, stream);
    }
  });
}

template <class T>
int launch_bias_gradient_of(
    const DeviceCall& call, const DeviceGradients& gradients, const Card& card, void* stream) {
  return with_head_size(call.head_size, [&](auto head_size) -> int {
    const BackwardShape shape = bias_gradient_shape(head_size, card.generation());
    const int num_rows = shape.num_outer_rows();
    const int64_t num_query_blocks = (gradients.bias_num_queries + num_rows - 1) / num_rows;
    const int64_t num_key_blocks = (call.num_keys + shape.num_inner_rows - 1) / shape.num_inner_rows;
    const int64_t num_entries = static_cast<int64_t>(gradients.bias_batch_size) * gradients.bias_num_heads;
    const dim3 grid(static_cast<unsigned>(num_entries * num_query_blocks * num_key_blocks));
    return launch_kernel(
        &bias_gradient_kernel<T, head_size>, grid, shape.num_threads(), shape.shared_bytes(head_size), stream, call,
        gradients);
  });
}

}  // namespace cuda
}  // namespace lmopt
