#include "cpu/attention/forward_tasks.h"

namespace lmopt {
namespace LMOPT_INSTRUCTION_SET {

bool attention_forward(const AttentionCall& call) {
  return ForwardTasks(call).run<Bfloat16Products>();
}

}  // namespace LMOPT_INSTRUCTION_SET
}  // namespace lmopt
