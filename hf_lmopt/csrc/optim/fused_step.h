// What the operator hands to a kernel of the fused step: plain pointers, already checked (fused_step_op.cpp).
#pragma once

#include <cstdint>

#include "cpu/capability.h"
#include "element_type.h"

namespace lmopt {

constexpr int kMaxStatesPerParameter = 4;
constexpr int kMaxRuleCoefficients = 10;
// Elements that a kernel takes at a time: as many as fit into the first cache with their states, since each run through
// memory that is left and taken up again costs time.
constexpr int kBlock = 1024;
// Elements that share one maximum in an 8-bit state, as in bitsandbytes.
constexpr int kQuantizedBlock = 256;
static_assert(kBlock % kQuantizedBlock == 0, "a maximum belongs to one block");

struct Codebook;

struct FusedTensor {
  int64_t numel;
  int64_t first_block;  // number of blocks in the tensors before this one
  void* parameter;
  const void* gradient;
  void* states[kMaxStatesPerParameter];
  float* absmax[kMaxStatesPerParameter];  // null where the state is float32
  ElementType parameter_type;
  ElementType gradient_type;
  float correction_scale;  // kernels set it: how far MARS clips the corrected gradient
  float cautious_scale;    // kernels set it: what a masked step is multiplied by
};

inline int64_t num_blocks(const FusedTensor& tensor) {
  return (tensor.numel + kBlock - 1) / kBlock;
}

inline int64_t num_quantized_blocks(const FusedTensor& tensor) {
  return (tensor.numel + kQuantizedBlock - 1) / kQuantizedBlock;
}

struct FusedStep {
  FusedTensor* tensors;
  int64_t num_tensors;
  int64_t num_blocks;
  const Codebook* codebooks[kMaxStatesPerParameter];
  double* block_sums;  // one per block, where a rule or a modifier needs a sum over each tensor, else null
  float coefficients[kMaxRuleCoefficients];
  float l2;
  float shrink_before;
  float shrink_after;
  bool cautious;
};

LMOPT_DECLARE_CPU_KERNEL(void fused_step(int rule, const FusedStep& step))

}  // namespace lmopt
