// Tasks for a team of threads, each taking the next one when it is free. Results must not depend on who does which.
#pragma once

#include <atomic>

#include "parallel.h"

namespace lmopt {
namespace LMOPT_INSTRUCTION_SET {

class Tasks {
 public:
  explicit Tasks(int64_t count) : count_(count) {}

  // Another one of [0, count); false when none is left.
  bool next(int64_t& task) {
    task = taken_++;
    return task < count_;
  }

 private:
  const int64_t count_;
  std::atomic<int64_t> taken_{0};
};

// Calls body(worker, tasks) in as many threads as there are tasks for; body takes tasks until none is left.
template <class Body>
inline void share_tasks(int64_t num_threads, int64_t count, const Body& body) {
  Tasks tasks(count);
  parallel_for(0, num_threads < count ? num_threads : count, 1, [&](int64_t worker, int64_t end) {
    for (; worker < end; ++worker) body(worker, tasks);
  });
}

}  // namespace LMOPT_INSTRUCTION_SET
}  // namespace lmopt
