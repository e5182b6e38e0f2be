// Tasks for workers that each need memory of their own.
#pragma once

#include <atomic>

#include "cpu/share_tasks.h"

namespace lmopt {
namespace LMOPT_INSTRUCTION_SET {

// Makes a Worker of the call in each thread, and calls run(worker, task) for each task. False if one got no memory.
template <class Worker, class Call, class Run>
bool run_tasks(int64_t num_threads, int64_t count, const Call& call, const Run& run) {
  std::atomic<bool> has_memory{true};
  share_tasks(num_threads, count, [&](int64_t, Tasks& tasks) {
    int64_t task;
    if (!tasks.next(task)) return;
    Worker worker(call);
    if (!worker.allocate()) {
      has_memory = false;
      return;
    }
    do run(worker, task);
    while (tasks.next(task));
  });
  return has_memory;
}

}  // namespace LMOPT_INSTRUCTION_SET
}  // namespace lmopt
