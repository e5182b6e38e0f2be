// Orthogonalises a batch of matrices [batch, m, n] by Newton-Schulz steps; coefficients has a, b and c of every step.
// The result is bfloat16. Needs a processor with AVX512_BF16; the Python package asks before it calls.
#include "optim/newton_schulz_op.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include "cpu/capability.h"
#include "cpu/newton_schulz.h"

namespace lmopt {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

MatrixType matrix_type_of(const Tensor& matrices) {
  switch (matrices.scalar_type()) {
    case ScalarType::Float:
      return MatrixType::float32;
    case ScalarType::BFloat16:
      return MatrixType::bfloat16;
    case ScalarType::Half:
      return MatrixType::float16;
    default:
      STD_TORCH_CHECK(
          false, "matrices have a type that newton_schulz cannot take. Allowed are float32, bfloat16 and float16. "
          "Convert them first.");
  }
}

}  // namespace

Tensor newton_schulz_cpu(const Tensor& matrices, std::vector<double> coefficients, double eps) {
  STD_TORCH_CHECK(
      cpu_has_avx512_bf16(), "newton_schulz was called with CPU capability ", cpu_capability_name(cpu_capability()),
      ", and needs avx512 with AVX512_BF16. Use the torch route of hf_lmopt.optim.newton_schulz.");
  STD_TORCH_CHECK(
      matrices.dim() == 3 && matrices.is_contiguous(), "matrices have ", matrices.dim(),
      " dimensions or are not contiguous. A contiguous tensor [batch, m, n] is needed: reshape it.");
  STD_TORCH_CHECK(
      coefficients.size() % 3 == 0, coefficients.size(),
      " coefficients were given. Each step takes three, a, b and c: give a multiple of three.");
  const std::vector<float> steps(coefficients.begin(), coefficients.end());
  Tensor result = torch::stable::new_empty(matrices, matrices.sizes(), ScalarType::BFloat16);
  NewtonSchulzProblem problem{};
  problem.matrices = matrices.const_data_ptr();
  problem.result = static_cast<uint16_t*>(result.mutable_data_ptr());
  problem.type = matrix_type_of(matrices);
  problem.batch = matrices.size(0);
  problem.rows = matrices.size(1);
  problem.columns = matrices.size(2);
  problem.coefficients = steps.data();
  problem.steps = static_cast<int64_t>(steps.size() / 3);
  problem.eps = eps;
  problem.threads = torch::stable::get_num_threads();
  if (matrices.numel() == 0) return result;
#if defined(__x86_64__)
  STD_TORCH_CHECK(
      avx512_bf16::newton_schulz(problem), "No memory for the workspace of newton_schulz over ", problem.rows, " x ",
      problem.columns, " matrices; about three times a matrix's size in bfloat16 is needed per thread. Free some.");
#endif
  return result;
}

}  // namespace lmopt
