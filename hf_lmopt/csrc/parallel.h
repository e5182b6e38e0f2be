// A parallel loop for kernels that may include no torch header (see cpu/capability.h), on torch's own threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

namespace lmopt {

using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);

// Calls body over disjoint ranges that cover [begin, end), each of at least grain_size items, one per thread.
void parallel_for(int64_t begin, int64_t end, int64_t grain_size, ParallelBody body, void* context);

// The same for a callable; a lambda's type is local to its file, so nothing is shared between instruction sets.
template <class Function>
inline void parallel_for(int64_t begin, int64_t end, int64_t grain_size, Function&& function) {
  parallel_for(
      begin, end, grain_size,
      [](int64_t first, int64_t last, void* context) {
        (*static_cast<std::remove_reference_t<Function>*>(context))(first, last);
      },
      &function);
}

// Runs body(worker, next) in as many threads as there are tasks for; each next() is another one of [0, count), and
// `count` when none is left. Results must not depend on who does which.
template <class Body>
inline void share_tasks(int64_t num_threads, int64_t count, const Body& body) {
  std::atomic<int64_t> taken{0};
  const auto next = [&] {
    const int64_t task = taken++;
    return task < count ? task : count;
  };
  parallel_for(0, num_threads < count ? num_threads : count, 1, [&](int64_t worker, int64_t end) {
    for (; worker < end; ++worker) body(worker, next);
  });
}

}  // namespace lmopt
