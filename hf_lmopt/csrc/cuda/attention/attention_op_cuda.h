// The operators of attention on CUDA tensors; arguments and results are those of attention/attention_op.h.
#pragma once

#include "attention/attention_arguments.h"

namespace lmopt {

std::tuple<torch::stable::Tensor, torch::stable::Tensor> attention_forward_cuda(
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
    const MaybeTensor& dropout_seed);

std::tuple<
    torch::stable::Tensor,
    torch::stable::Tensor,
    torch::stable::Tensor,
    torch::stable::Tensor,
    torch::stable::Tensor>
attention_backward_cuda(
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
    bool needs_sinks_gradient);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> block_map_cuda(const torch::stable::Tensor& mask);

}  // namespace lmopt
