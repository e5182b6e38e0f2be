// What the operators of attention hand to a kernel: plain pointers, already checked (attention_op.cpp).
//
// What it means is defined in hf_lmopt/attention/reference.py. B batch, Hq and Hkv heads, Lq queries, Lk keys, D head
// size.
#pragma once

#include <cstdint>

#include "attention/visibility.h"
#include "cpu/capability.h"
#include "element_type.h"

namespace lmopt {

// A tensor [B, H, L, D] whose last dimension is dense; strides in elements, 0 where it is broadcast.
struct AttentionTensor {
  void* data;
  int64_t batch_stride, head_stride, row_stride;
};

// [B|1, Hq|1, Lq|1, Lk] with a dense last dimension; data is null if there is none.
struct AttentionBias {
  void* data;
  ElementType type;
  int64_t batch_stride, head_stride, row_stride;
};

struct AttentionCall {
  ElementType type;  // of all tensors but bias
  int64_t batch_size, num_heads, num_key_heads, num_queries, num_keys, head_size;
  AttentionTensor query, key, value, output;
  AttentionBias bias;
  const float* sinks;  // [Hq], or null
  float* logsumexp;    // [B, Hq, Lq], contiguous
  float scale;
  float softcap;  // 0 for none
  double dropout_p;
  uint64_t dropout_seed;
  const Visibility* visibility;
  int64_t num_threads;
};

// Of the same call; bias_gradient and sinks_gradient are null where nobody asks for them.
struct AttentionGradients {
  AttentionTensor output_gradient;
  const float* logsumexp_gradient;  // [B, Hq, Lq], contiguous, or null
  AttentionTensor query, key, value;
  float* bias;   // contiguous, of the bias' own shape [Bb, Hb, Qb, Lk]
  int64_t bias_batch_size, bias_num_heads, bias_num_queries;
  float* sinks;  // [Hq]
};

// False if there is no memory for the workspace.
LMOPT_DECLARE_CPU_KERNEL(bool attention_forward(const AttentionCall& call))
LMOPT_DECLARE_CPU_KERNEL(bool attention_backward(const AttentionCall& call, const AttentionGradients& gradients))

#if defined(__x86_64__)
// For bfloat16, where cpu_has_avx512_bf16().
namespace avx512_bf16 {
bool attention_forward(const AttentionCall& call);
bool attention_backward(const AttentionCall& call, const AttentionGradients& gradients);
}  // namespace avx512_bf16
#endif

}  // namespace lmopt
