// A parallel loop for kernels that may include no torch header (see cpu/capability.h), on torch's own threads.
#pragma once

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

}  // namespace lmopt
