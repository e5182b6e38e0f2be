// Attention over CUDA tensors, for arguments that are checked; see attention/attention_operator.h.
#pragma once

#include "attention/attention_operator.h"

namespace lmopt {

AttentionResults attention_forward_cuda(const AttentionArguments& arguments);

AttentionGradientTensors attention_backward_cuda(
    const AttentionArguments& arguments, const AttentionUpstream& upstream);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> block_map_cuda(const torch::stable::Tensor& mask);

}  // namespace lmopt
