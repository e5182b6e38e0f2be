// Every operator of torch.ops.lmopt: its schema, and which function runs it on which device.
//
// To add one: declare its function over torch::stable::Tensor in a header beside its checks (optim/NAME_op.h and
// optim/NAME_op.cpp, compiled once), put the kernel into cpu/ (see cpu/capability.h for what may be included there), and
// add a line to each block below. Stable ABI only: no Python.h, no ATen, no c10.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/capability.h"
#include "optim/fused_step_op.h"
#include "optim/newton_schulz_op.h"

namespace lmopt {
namespace {

std::string cpu_capability_in_use() {
  return cpu_capability_name(cpu_capability());
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
  m.def("newton_schulz(Tensor matrices, float[] coefficients, float eps) -> Tensor");
}

// Operators without a tensor argument have no device to choose by.
STABLE_TORCH_LIBRARY_IMPL(lmopt, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&lmopt::cpu_capability_in_use));
  m.impl("cpu_has_avx512_bf16", TORCH_BOX(&lmopt::has_avx512_bf16_in_use));
}

STABLE_TORCH_LIBRARY_IMPL(lmopt, CPU, m) {
  m.impl("fused_step_", TORCH_BOX(&lmopt::fused_step_cpu));
  m.impl("newton_schulz", TORCH_BOX(&lmopt::newton_schulz_cpu));
}
