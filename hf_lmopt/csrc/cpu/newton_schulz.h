// Newton-Schulz steps over a batch of equal matrices; optim/newton_schulz_op.h is the operator in front of it.
#pragma once

#include <cstdint>

namespace lmopt {

enum class MatrixType { float32, bfloat16, float16 };

struct NewtonSchulzProblem {
  const void* matrices;  // [batch, rows, columns], contiguous
  uint16_t* result;      // the same shape, bfloat16
  MatrixType type;
  int64_t batch, rows, columns;
  const float* coefficients;  // a, b, c of every step
  int64_t steps;
  double eps;
  int64_t threads;
};

// Only where cpu_has_avx512_bf16(). Returns false if there is no memory for the workspace.
namespace avx512_bf16 {
bool newton_schulz(const NewtonSchulzProblem& problem);
}

}  // namespace lmopt
