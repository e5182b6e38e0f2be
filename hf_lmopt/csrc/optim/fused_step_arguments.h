// The arguments of lmopt::fused_step_, checked alike for every device; the contract is in fused_step_arguments.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "optim/fused_step.h"

namespace lmopt {

struct FusedStepArguments {
  std::string rule;
  std::vector<torch::stable::Tensor> parameters;
  std::vector<torch::stable::Tensor> gradients;
  std::vector<torch::stable::Tensor> states;
  std::vector<torch::stable::Tensor> absmax;
  std::vector<torch::stable::Tensor> codebooks;
  std::vector<double> coefficients;
  double l2;
  double shrink_before;
  double shrink_after;
  bool cautious;
};

struct CheckedFusedStep {
  int rule;         // its number in optim/rules.h
  bool needs_sums;  // over each tensor, before the step
  std::vector<FusedTensor> tensors;
  FusedStep step;  // of these tensors; block_sums and codebooks are left to the device's operator
  const float* codebooks[kMaxStatesPerParameter];  // 256 values where tensors lie, null for states in float32
};

// Throws where something does not fit, or does not lie on one device.
CheckedFusedStep check_fused_step(const FusedStepArguments& arguments);

}  // namespace lmopt
