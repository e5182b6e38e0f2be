// The operator lmopt::newton_schulz over tensors; its contract is in newton_schulz_op.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace lmopt {

torch::stable::Tensor newton_schulz_cpu(
    const torch::stable::Tensor& matrices, std::vector<double> coefficients, double eps);

}  // namespace lmopt
