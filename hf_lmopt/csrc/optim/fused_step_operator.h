// The signature of the operator lmopt::fused_step_, once for all devices; its contract is in fused_step_arguments.cpp.
//
//   m.impl("fused_step_", TORCH_BOX(&lmopt::fused_step_operator<&lmopt::fused_step_cpu>));
#pragma once

#include <utility>

#include "optim/fused_step_arguments.h"

namespace lmopt {

template <void (*run)(const FusedStepArguments&)>
void fused_step_operator(
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
    bool cautious) {
  run(FusedStepArguments{
      std::move(rule), std::move(parameters), std::move(gradients), std::move(states), std::move(absmax),
      std::move(codebooks), std::move(coefficients), l2, shrink_before, shrink_after, cautious});
}

}  // namespace lmopt
