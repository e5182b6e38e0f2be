// The fused step over tensors of the CPU; see optim/fused_step_operator.h.
#pragma once

#include "optim/fused_step_operator.h"

namespace lmopt {

void fused_step_cpu(const FusedStepArguments& arguments);

}  // namespace lmopt
