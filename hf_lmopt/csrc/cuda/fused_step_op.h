// The operator lmopt::fused_step_ over tensors of a CUDA device; its contract is in optim/fused_step_arguments.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

namespace lmopt {

void fused_step_cuda(
    std::string rule,
    std::vector<torch::stable::Tensor> parameters,
    std::vector<torch::stable::Tensor> gradients,
    std::vector<torch::stable::Tensor> states,
    std::vector<torch::stable::Tensor> absmax,
    std::vector<torch::stable::Tensor> codebooks,
    std::vector<double> coefficients,
    double l2,
    double shrink_before,
    double shrink_after,
    bool cautious);

}  // namespace lmopt
