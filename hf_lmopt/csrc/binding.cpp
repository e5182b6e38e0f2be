// Every operator of torch.ops.lmopt: its schema, and which function runs it on which device.
//
// To add one: declare its function over torch::stable::Tensor in a header beside its checks (optim/NAME_op.h and
// optim/NAME_op.cpp, compiled once), put the kernel into cpu/ (see cpu/capability.h for what may be included there), and
// add a line to each block below. Stable ABI only: no Python.h, no ATen, no c10.
#include <torch/csrc/stable/library.h>

#include <string>

#include "attention/attention_op.h"
#include "cpu/capability.h"
#include "optim/fused_step_op.h"
#include "optim/newton_schulz_op.h"

namespace lmopt {
namespace {

// Of most kernels; cpu_has_avx512_bf16 tells of the few for bfloat16 products.
std::string cpu_capability_in_use() {
  return cpu_capability_name(cpu_has_avx512_bf16() ? CpuCapability::avx512 : cpu_capability());
}

bool has_avx512_bf16_in_use() {
  return cpu_has_avx512_bf16();
}

}  // namespace
}  // namespace lmopt

STABLE_TORCH_LIBRARY(lmopt, m) {
  m.def("cpu_capability() -> str");
  m.def("cpu_has_avx512_bf16() -> bool");
  m.def(
      "fused_step_(str rule, Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] states, Tensor(c!)[] absmax, "
      "Tensor[] codebooks, float[] coefficients, float l2, float shrink_before, float shrink_after, bool cautious) "
      "-> ()");
  m.def(
      "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias, Tensor? sinks, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, float scale, bool is_causal, int window_left, int window_right, "
      "float softcap, float dropout_p, Tensor? dropout_seed) -> (Tensor output, Tensor logsumexp)");
  m.def(
      "attention_backward(Tensor output_gradient, Tensor? logsumexp_gradient, Tensor output, Tensor logsumexp, "
      "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias, Tensor? sinks, Tensor? cu_seqlens_q, "
      "Tensor? cu_seqlens_k, float scale, bool is_causal, int window_left, int window_right, float softcap, "
      "float dropout_p, Tensor? dropout_seed, bool needs_bias_gradient, bool needs_sinks_gradient) "
      "-> (Tensor query_gradient, Tensor key_gradient, Tensor value_gradient, Tensor bias_gradient, "
      "Tensor sinks_gradient)");
  m.def("block_map(Tensor mask) -> (Tensor states, Tensor words)");
  m.def("newton_schulz(Tensor matrices, float[] coefficients, float eps) -> Tensor");
}

// Operators without a tensor argument have no device to choose by.
STABLE_TORCH_LIBRARY_IMPL(lmopt, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&lmopt::cpu_capability_in_use));
  m.impl("cpu_has_avx512_bf16", TORCH_BOX(&lmopt::has_avx512_bf16_in_use));
}

STABLE_TORCH_LIBRARY_IMPL(lmopt, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&lmopt::attention_forward_operator<&lmopt::attention_forward_cpu>));
  m.impl("attention_backward", TORCH_BOX(&lmopt::attention_backward_operator<&lmopt::attention_backward_cpu>));
  m.impl("block_map", TORCH_BOX(&lmopt::block_map_cpu));
  m.impl("fused_step_", TORCH_BOX(&lmopt::fused_step_operator<&lmopt::fused_step_cpu>));
  m.impl("newton_schulz", TORCH_BOX(&lmopt::newton_schulz_cpu));
}
