// Attention over CUDA tensors: allocates results and workspaces, and launches the kernels on torch's current stream.
#include "cuda/attention/attention_op_cuda.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include "cuda/attention/prepared_call.h"
#include "cuda/device.h"

namespace lmopt {
namespace {

using namespace cuda;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

float* floats_of(const Tensor& tensor) { return static_cast<float*>(const_cast<void*>(tensor.const_data_ptr())); }

Tensor new_rows_of_floats(const AttentionArguments& arguments) {
  return new_contiguous(
      {arguments.batch_size(), arguments.num_heads(), arguments.num_queries()}, ScalarType::Float, arguments.query);
}

void run_split_forward(
    const DeviceCall& call, int num_splits, const AttentionArguments& arguments, const Card& card, void* stream) {
  const int64_t num_rows = arguments.batch_size() * arguments.num_heads() * arguments.num_queries();
  const Tensor outputs =
      new_contiguous({num_splits, num_rows, arguments.head_size()}, ScalarType::Float, arguments.query);
  const Tensor logsumexps = new_contiguous({num_splits, num_rows}, ScalarType::Float, arguments.query);
  const SplitKeys split{num_splits, floats_of(outputs), floats_of(logsumexps)};
  check_launch(launch_forward_split(call, split, card, stream), "Attention over a part of the keys");
  check_launch(launch_combine(call, split, stream), "Joining attention over parts of the keys");
}

// float32 for a gradient that is summed up, or an empty tensor.
Tensor new_sum(const MaybeTensor& of, bool is_needed, const Tensor& like) {
  if (!of || !is_needed) return new_contiguous({0}, of ? of->scalar_type() : like.scalar_type(), like);
  const auto sizes = of->sizes();
  return new_contiguous(std::vector<int64_t>(sizes.begin(), sizes.end()), ScalarType::Float, like);
}

}  // namespace

AttentionResults attention_forward_cuda(const AttentionArguments& arguments) {
  const Tensor& query = arguments.query;
  const OnDevice on_device(query);
  Tensor output = new_projection(query), logsumexp = new_rows_of_floats(arguments);
  if (arguments.batch_size() == 0 || arguments.num_queries() == 0) return {output, logsumexp};
  void* stream = current_stream(query);
  const PreparedCall prepared(arguments, stream);
  const DeviceCall call = prepared.with_results(output, logsumexp);
  const int num_splits = choose_num_splits(call, prepared.card());
  if (num_splits > 0) {
    run_split_forward(call, num_splits, arguments, prepared.card(), stream);
  } else {
    check_launch(launch_forward(call, prepared.card(), stream), "Attention");
  }
  return {output, logsumexp};
}

AttentionGradientTensors attention_backward_cuda(
    const AttentionArguments& arguments, const AttentionUpstream& upstream) {
  const Tensor& query = arguments.query;
  const OnDevice on_device(query);
  Tensor query_gradient = new_projection(query), key_gradient = new_projection(arguments.key);
  Tensor value_gradient = new_projection(arguments.value);
  Tensor bias_gradient = new_sum(arguments.bias, upstream.needs_bias_gradient, query);
  Tensor sinks_gradient = new_sum(arguments.sinks, upstream.needs_sinks_gradient, query);
  if (arguments.batch_size() == 0) {
    torch::stable::zero_(bias_gradient);
    torch::stable::zero_(sinks_gradient);
    return {query_gradient, key_gradient, value_gradient, bias_gradient, sinks_gradient};
  }
  void* stream = current_stream(query);
  const Tensor output_rows = make_rows_dense_on_device(upstream.output);
  const Tensor output_gradient_rows = make_rows_dense_on_device(upstream.output_gradient);
  const Tensor logsumexp = make_contiguous_on_device(upstream.logsumexp, ScalarType::Float);
  MaybeTensor logsumexp_gradient;
  if (upstream.logsumexp_gradient) {
    logsumexp_gradient = make_contiguous_on_device(*upstream.logsumexp_gradient, ScalarType::Float);
  }
  const Tensor origins = new_rows_of_floats(arguments), deltas = new_rows_of_floats(arguments);
  const PreparedCall prepared(arguments, stream);
  const DeviceCall call = prepared.with_results(output_rows, logsumexp);
  DeviceGradients gradients{};
  gradients.output_gradient = describe_on_device(output_gradient_rows);
  if (logsumexp_gradient) gradients.logsumexp_gradient = floats_of(*logsumexp_gradient);
  gradients.query = describe_on_device(query_gradient);
  gradients.key = describe_on_device(key_gradient);
  gradients.value = describe_on_device(value_gradient);
  gradients.origins = floats_of(origins);
  gradients.deltas = floats_of(deltas);
  check_launch(launch_prepare_backward(call, gradients, stream), "Preparing the gradients of attention");
  check_launch(launch_backward(call, gradients, prepared.card(), stream), "The gradients of attention");
  if (bias_gradient.numel() > 0) {
    gradients.bias = floats_of(bias_gradient);
    gradients.bias_batch_size = static_cast<int32_t>(bias_gradient.size(0));
    gradients.bias_num_heads = static_cast<int32_t>(bias_gradient.size(1));
    gradients.bias_num_queries = static_cast<int32_t>(bias_gradient.size(2));
    check_launch(launch_bias_gradient(call, gradients, prepared.card(), stream), "The gradient of bias");
  }
  if (sinks_gradient.numel() > 0) {
    gradients.sinks = floats_of(sinks_gradient);
    check_launch(launch_sinks_gradient(call, gradients, stream), "The gradient of sinks");
  }
  return {query_gradient, key_gradient, value_gradient, bias_gradient, sinks_gradient};
}

std::tuple<Tensor, Tensor> block_map_cuda(const Tensor& mask) {
  STD_TORCH_CHECK(
      mask.dim() == 4, "mask has shape ", sizes_of(mask),
      ". It must have four dimensions, [batch, heads, queries, keys]: unsqueeze it.");
  check_mask(mask, {mask.size(0), mask.size(1), mask.size(2), mask.size(3)});
  const OnDevice on_device(mask);
  const Tensor dense = make_rows_dense_on_device(mask);
  const int64_t query_blocks = num_attention_blocks(mask.size(2)), key_blocks = num_attention_blocks(mask.size(3));
  Tensor states = new_contiguous({mask.size(0), mask.size(1), query_blocks, key_blocks}, ScalarType::Byte, mask);
  Tensor words = new_contiguous(
      {mask.size(0), mask.size(1), query_blocks, key_blocks, kAttentionBlock}, ScalarType::Long, mask);
  if (words.numel() == 0) return {states, words};
  const AttentionMask plain = describe_mask(dense);
  // Each entry of an expanded mask is written out.
  const DeviceMask view{
      plain.data, static_cast<int32_t>(mask.size(0)), static_cast<int32_t>(mask.size(1)), plain.batch_stride,
      plain.head_stride, plain.row_stride};
  VisibilityRules rules{};
  rules.num_queries = static_cast<int32_t>(mask.size(2));
  rules.num_keys = static_cast<int32_t>(mask.size(3));
  rules.window_left = rules.window_right = -1;
  MapResults results{};
  results.states = static_cast<BlockState*>(states.mutable_data_ptr());
  results.words = static_cast<uint64_t*>(words.mutable_data_ptr());
  check_launch(build_map(view, rules, results, current_stream(mask)), "Mapping the mask by blocks");
  return {states, words};
}

}  // namespace lmopt
