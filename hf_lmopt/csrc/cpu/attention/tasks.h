// Tasks for a team of threads, each taking the next one when it is free. Results must not depend on who does which.
#pragma once

#include <atomic>

#include "parallel.h"

namespace lmopt {
namespace LMOPT_INSTRUCTION_SET {

// Makes a Worker of the call per thread, and calls run(worker, task) for each task.
// False if a worker got no memory.
template <class Worker, class Call, class Run>
bool run_tasks(int64_t num_threads, int64_t num_tasks, const Call& call, const Run& run) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> has_memory{true};
  const int64_t num_workers = num_threads < num_tasks ? num_threads : num_tasks;
  parallel_for(0, num_workers, 1, [&](int64_t first, int64_t end) {
    for (; first < end; ++first) {
      int64_t task = next++;
      if (task >= num_tasks) return;
      Worker worker(call);
      if (!worker.allocate()) {
        has_memory = false;
        return;
      }
      for (; task < num_tasks; task = next++) run(worker, task);
    }
  });
  return has_memory;
}

}  // namespace LMOPT_INSTRUCTION_SET
}  // namespace lmopt
