// The fused step over tensors of a CUDA device; see optim/fused_step_operator.h.
#pragma once

#include "optim/fused_step_operator.h"

namespace lmopt {

void fused_step_cuda(const FusedStepArguments& arguments);

}  // namespace lmopt
