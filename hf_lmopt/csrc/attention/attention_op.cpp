// Attention over tensors, as hf_lmopt/attention/reference.py defines it:
//
//   attention_forward   output [B, Hq, Lq, D], in memory as [B, Lq, Hq, D], and logsumexp [B, Hq, Lq], float32
//   attention_backward  the gradients of query, key, value (each in memory as [B, L, H, D]), bias and sinks; for each
//                       of the last two an empty tensor where none is asked for
//   block_map           states, uint8 [Bm, Hm, Lq / 64, Lk / 64] (rounded up), and words, int64 [..., 64], of a mask;
//                       see hf_lmopt/attention/block_mask.py
//
// window -1 is no limit, softcap 0 none; dropout_seed is one int64. This file allocates the results, answers calls
// over empty tensors, and hands plain pointers to the kernel for this processor. Tensors whose last dimension is dense
// are taken as they lie.
#include "attention/attention_op.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <limits>
#include <numeric>

#include "attention/prepared_call.h"

namespace lmopt {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Uninitialized, on the CPU; without the dispatcher, which takes longer than a short attention.
Tensor new_tensor(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType type) {
  AtenTensorHandle handle;
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), code, aoti_torch_device_type_cpu(), 0,
      &handle));
  return Tensor(handle);
}

// [B, H, L, D] that lies in memory as [B, L, H, D].
Tensor new_projection(const Tensor& like) {
  const int64_t num_heads = like.size(1), length = like.size(2), head_size = like.size(3);
  const int64_t row = num_heads * head_size;
  return new_tensor(
      {like.size(0), num_heads, length, head_size}, {std::max<int64_t>(length, 1) * row, head_size, row, 1},
      like.scalar_type());
}

Tensor new_logsumexp(const Tensor& query) {
  const int64_t num_heads = query.size(1), num_queries = query.size(2), row = std::max<int64_t>(num_queries, 1);
  return new_tensor({query.size(0), num_heads, num_queries}, {num_heads * row, row, 1}, ScalarType::Float);
}

Tensor make_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

#if defined(__x86_64__)
bool uses_avx512_bf16(const AttentionCall& call) {
  return call.type == ElementType::bfloat16 && cpu_has_avx512_bf16();
}
#endif

bool run_forward(const AttentionCall& call) {
#if defined(__x86_64__)
  if (uses_avx512_bf16(call)) return avx512_bf16::attention_forward(call);
#endif
  return LMOPT_CHOOSE_CPU_KERNEL(attention_forward)(call);
}

bool run_backward(const AttentionCall& call, const AttentionGradients& gradients) {
#if defined(__x86_64__)
  if (uses_avx512_bf16(call)) return avx512_bf16::attention_backward(call, gradients);
#endif
  return LMOPT_CHOOSE_CPU_KERNEL(attention_backward)(call, gradients);
}

// Kernels copy what they read again and again into float32, and sum up gradients in it.
void check_memory(bool has_memory, int64_t num_copies, const AttentionArguments& arguments) {
  const int64_t floats = arguments.head_size() * (arguments.num_queries() + 2 * arguments.num_keys());
  const int64_t num_threads = torch::stable::get_num_threads();
  STD_TORCH_CHECK(
      has_memory, "No memory for the workspace of attention with query ", sizes_of(arguments.query), " and key ",
      sizes_of(arguments.key), ". ", num_threads, " threads need about ",
      (num_copies * num_threads * floats * 4 >> 20) + 1,
      " MiB. Free some, or use fewer threads by torch.set_num_threads.");
}

// float32 for a gradient that is summed up, or an empty tensor.
Tensor new_sum(const MaybeTensor& of, bool is_needed, const Tensor& like) {
  if (!of || !is_needed) return new_tensor({0}, {1}, of ? of->scalar_type() : like.scalar_type());
  return torch::stable::new_empty(*of, of->sizes(), ScalarType::Float);
}

// Without keys, the logsumexp is the sink; one of -inf is none.
void sum_over_queries(const Tensor& logsumexp_gradient, const Tensor& logsumexp, Tensor& sinks_gradient) {
  const float *row = float_data(logsumexp_gradient), *of_sink = float_data(logsumexp);
  const int64_t num_heads = sinks_gradient.numel(), num_queries = logsumexp_gradient.size(2);
  float* sum = float_data(sinks_gradient);
  for (int64_t i = 0; i < logsumexp_gradient.size(0) * num_heads; ++i) {
    if (num_queries == 0 || of_sink[i * num_queries] == -std::numeric_limits<float>::infinity()) continue;
    sum[i % num_heads] = std::accumulate(row + i * num_queries, row + (i + 1) * num_queries, sum[i % num_heads]);
  }
}

// Without keys, what is seen is the sink.
void fill_empty_logsumexp(Tensor& logsumexp, const MaybeTensor& sinks) {
  torch::stable::fill_(logsumexp, -std::numeric_limits<double>::infinity());
  if (!sinks) return;
  const Tensor dense = torch::stable::contiguous(torch::stable::to(*sinks, ScalarType::Float));
  const float* sink = float_data(dense);
  float* row = float_data(logsumexp);
  const int64_t num_heads = logsumexp.size(1), num_queries = logsumexp.size(2);
  for (int64_t i = 0; i < logsumexp.size(0) * num_heads; ++i) {
    std::fill_n(row + i * num_queries, num_queries, sink[i % num_heads]);
  }
}

}  // namespace

AttentionResults attention_forward_cpu(const AttentionArguments& arguments) {
  Tensor output = new_projection(arguments.query);
  Tensor logsumexp = new_logsumexp(arguments.query);
  if (arguments.is_empty()) {
    torch::stable::zero_(output);
    fill_empty_logsumexp(logsumexp, arguments.sinks);
  } else {
    const PreparedCall prepared(arguments);
    check_memory(run_forward(prepared.with_results(output, logsumexp)), 1, arguments);
  }
  return {output, logsumexp};
}

AttentionGradientTensors attention_backward_cpu(
    const AttentionArguments& arguments, const AttentionUpstream& upstream) {
  const Tensor& query = arguments.query;
  Tensor query_gradient = new_projection(query), key_gradient = new_projection(arguments.key);
  Tensor value_gradient = new_projection(arguments.value);
  Tensor bias_gradient = new_sum(arguments.bias, upstream.needs_bias_gradient, query);
  Tensor sinks_gradient = new_sum(arguments.sinks, upstream.needs_sinks_gradient, query);
  const Tensor output_rows = make_rows_dense(upstream.output);
  const Tensor output_gradient_rows = make_rows_dense(upstream.output_gradient);
  const Tensor dense_logsumexp = make_contiguous(upstream.logsumexp);
  MaybeTensor dense_logsumexp_gradient;
  if (upstream.logsumexp_gradient) dense_logsumexp_gradient = make_contiguous(*upstream.logsumexp_gradient);
  if (arguments.is_empty()) {
    for (Tensor* gradient : {&query_gradient, &key_gradient, &value_gradient, &bias_gradient, &sinks_gradient}) {
      torch::stable::zero_(*gradient);
    }
    if (dense_logsumexp_gradient) sum_over_queries(*dense_logsumexp_gradient, dense_logsumexp, sinks_gradient);
  } else {
    const PreparedCall prepared(arguments);
    AttentionGradients gradients{};
    gradients.output_gradient = describe(output_gradient_rows);
    if (dense_logsumexp_gradient) gradients.logsumexp_gradient = float_data(*dense_logsumexp_gradient);
    gradients.query = describe(query_gradient);
    gradients.key = describe(key_gradient);
    gradients.value = describe(value_gradient);
    if (bias_gradient.numel() > 0) {
      gradients.bias = float_data(bias_gradient);
      gradients.bias_batch_size = bias_gradient.size(0);
      gradients.bias_num_heads = bias_gradient.size(1);
      gradients.bias_num_queries = bias_gradient.size(2);
    }
    if (sinks_gradient.numel() > 0) gradients.sinks = float_data(sinks_gradient);
    const bool has_memory = run_backward(prepared.with_results(output_rows, dense_logsumexp), gradients);
    check_memory(has_memory, 3, arguments);
  }
  return {query_gradient, key_gradient, value_gradient, bias_gradient, sinks_gradient};
}

std::tuple<Tensor, Tensor> block_map_cpu(const Tensor& mask) {
  STD_TORCH_CHECK(
      mask.dim() == 4, "mask has shape ", sizes_of(mask),
      ". It must have four dimensions, [batch, heads, queries, keys]: unsqueeze it.");
  check_mask(mask, {mask.size(0), mask.size(1), mask.size(2), mask.size(3)});
  const Tensor dense = make_rows_dense(mask);
  AttentionMask view = describe_mask(dense);
  view.batch_size = mask.size(0);  // each entry of an expanded mask is written out
  view.num_heads = mask.size(1);
  const int64_t query_blocks = num_attention_blocks(mask.size(2)), key_blocks = num_attention_blocks(mask.size(3));
  Tensor states = torch::stable::new_empty(
      mask, {mask.size(0), mask.size(1), query_blocks, key_blocks}, ScalarType::Byte);
  Tensor words = torch::stable::new_empty(
      mask, {mask.size(0), mask.size(1), query_blocks, key_blocks, kAttentionBlock}, ScalarType::Long);
  map_blocks(
      view, mask.size(2), mask.size(3), static_cast<BlockState*>(states.mutable_data_ptr()),
      static_cast<uint64_t*>(words.mutable_data_ptr()));
  return {states, words};
}

}  // namespace lmopt
