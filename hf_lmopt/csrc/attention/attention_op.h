// The operators of attention over tensors; their contracts are in attention_op.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace lmopt {

std::tuple<torch::stable::Tensor, torch::stable::Tensor> attention_forward_cpu(
    const torch::stable::Tensor& query,
    const torch::stable::Tensor& key,
    const torch::stable::Tensor& value,
    const std::optional<torch::stable::Tensor>& mask,
    const std::optional<torch::stable::Tensor>& bias,
    const std::optional<torch::stable::Tensor>& sinks,
    const std::optional<torch::stable::Tensor>& cu_seqlens_q,
    const std::optional<torch::stable::Tensor>& cu_seqlens_k,
    double scale,
    bool is_causal,
    int64_t window_left,
    int64_t window_right,
    double softcap,
    double dropout_p,
    const std::optional<torch::stable::Tensor>& dropout_seed);

std::tuple<
    torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>
attention_backward_cpu(
    const torch::stable::Tensor& output_gradient,
    const std::optional<torch::stable::Tensor>& logsumexp_gradient,
    const torch::stable::Tensor& output,
    const torch::stable::Tensor& logsumexp,
    const torch::stable::Tensor& query,
    const torch::stable::Tensor& key,
    const torch::stable::Tensor& value,
    const std::optional<torch::stable::Tensor>& mask,
    const std::optional<torch::stable::Tensor>& bias,
    const std::optional<torch::stable::Tensor>& sinks,
    const std::optional<torch::stable::Tensor>& cu_seqlens_q,
    const std::optional<torch::stable::Tensor>& cu_seqlens_k,
    double scale,
    bool is_causal,
    int64_t window_left,
    int64_t window_right,
    double softcap,
    double dropout_p,
    const std::optional<torch::stable::Tensor>& dropout_seed,
    bool needs_bias_gradient,
    bool needs_sinks_gradient);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> block_map_cpu(const torch::stable::Tensor& mask);

}  // namespace lmopt
