// Attention over tensors of the CPU, for arguments that are checked; see attention_operator.h.
#pragma once

#include "attention/attention_operator.h"

namespace lmopt {

AttentionResults attention_forward_cpu(const AttentionArguments& arguments);

AttentionGradientTensors attention_backward_cpu(
    const AttentionArguments& arguments, const AttentionUpstream& upstream);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> block_map_cpu(const torch::stable::Tensor& mask);

}  // namespace lmopt
