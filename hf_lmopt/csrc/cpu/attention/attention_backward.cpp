#include "cpu/attention/backward_tasks.h"

namespace lmopt {
namespace LMOPT_INSTRUCTION_SET {

bool attention_backward(const AttentionCall& call, const AttentionGradients& gradients) {
  return BackwardTasks(call, gradients).run<Float32Products>();
}

}  // namespace LMOPT_INSTRUCTION_SET
}  // namespace lmopt
