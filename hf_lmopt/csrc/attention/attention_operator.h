// The signatures of the operators of attention, once for all devices: they put the arguments of a call together, check
// them, and hand them to the device's function.
//
//   m.impl("attention_forward", TORCH_BOX(&lmopt::attention_forward_operator<&lmopt::attention_forward_cpu>));
#pragma once

#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "attention/attention_arguments.h"

namespace lmopt {

// output and logsumexp
using AttentionResults = std::tuple<torch::stable::Tensor, torch::stable::Tensor>;

// The gradients of query, key, value, bias and sinks; the last two in float32, and empty where nobody asks for them.
using AttentionGradientTensors = std::tuple<
    torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>;

template <AttentionResults (*run)(const AttentionArguments&)>
AttentionResults attention_forward_operator(
    const torch::stable::Tensor& query,
    const torch::stable::Tensor& key,
    const torch::stable::Tensor& value,
    const MaybeTensor& mask,
    const MaybeTensor& bias,
    const MaybeTensor& sinks,
    const MaybeTensor& cu_seqlens_q,
    const MaybeTensor& cu_seqlens_k,
    double scale,
    bool is_causal,
    int64_t window_left,
    int64_t window_right,
    double softcap,
    double dropout_p,
    const MaybeTensor& dropout_seed) {
  const AttentionArguments arguments{
      query, key, value, mask, bias, sinks, cu_seqlens_q, cu_seqlens_k, static_cast<float>(scale), is_causal,
      window_left, window_right, static_cast<float>(softcap), dropout_p, dropout_seed};
  check_arguments(arguments);
  return run(arguments);
}

template <AttentionGradientTensors (*run)(const AttentionArguments&, const AttentionUpstream&)>
AttentionGradientTensors attention_backward_operator(
    const torch::stable::Tensor& output_gradient,
    const MaybeTensor& logsumexp_gradient,
    const torch::stable::Tensor& output,
    const torch::stable::Tensor& logsumexp,
    const torch::stable::Tensor& query,
    const torch::stable::Tensor& key,
    const torch::stable::Tensor& value,
    const MaybeTensor& mask,
    const MaybeTensor& bias,
    const MaybeTensor& sinks,
    const MaybeTensor& cu_seqlens_q,
    const MaybeTensor& cu_seqlens_k,
    double scale,
    bool is_causal,
    int64_t window_left,
    int64_t window_right,
    double softcap,
    double dropout_p,
    const MaybeTensor& dropout_seed,
    bool needs_bias_gradient,
    bool needs_sinks_gradient) {
  const AttentionArguments arguments{
      query, key, value, mask, bias, sinks, cu_seqlens_q, cu_seqlens_k, static_cast<float>(scale), is_causal,
      window_left, window_right, static_cast<float>(softcap), dropout_p, dropout_seed};
  const AttentionUpstream upstream{
      output_gradient, logsumexp_gradient, output, logsumexp, bias && needs_bias_gradient,
      sinks && needs_sinks_gradient};
  check_arguments(arguments);
  check_upstream(arguments, upstream);
  AttentionGradientTensors gradients = run(arguments, upstream);
  if (bias) std::get<3>(gradients) = torch::stable::to(std::get<3>(gradients), bias->scalar_type());
  if (sinks) std::get<4>(gradients) = torch::stable::to(std::get<4>(gradients), sinks->scalar_type());
  return gradients;
}

}  // namespace lmopt
