#include "parallel.h"

#include <torch/csrc/stable/ops.h>

namespace lmopt {

void parallel_for(int64_t begin, int64_t end, int64_t grain_size, ParallelBody body, void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain_size, body, context));
}

}  // namespace lmopt
