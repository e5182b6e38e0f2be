// The operators of torch.ops.lmopt that have a CUDA kernel; their schemas are in csrc/binding.cpp.
#include <torch/csrc/stable/library.h>

#include "cuda/attention/attention_op_cuda.h"
#include "cuda/fused_step_op.h"

STABLE_TORCH_LIBRARY_IMPL(lmopt, CUDA, m) {
  m.impl("attention_forward", TORCH_BOX(&lmopt::attention_forward_operator<&lmopt::attention_forward_cuda>));
  m.impl("attention_backward", TORCH_BOX(&lmopt::attention_backward_operator<&lmopt::attention_backward_cuda>));
  m.impl("block_map", TORCH_BOX(&lmopt::block_map_cuda));
  m.impl("fused_step_", TORCH_BOX(&lmopt::fused_step_operator<&lmopt::fused_step_cuda>));
}
