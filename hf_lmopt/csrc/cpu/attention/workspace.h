// Memory of one thread for one call, taken at once and cut into pieces.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace lmopt {
namespace LMOPT_INSTRUCTION_SET {

class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { std::free(memory_); }

  // Plans a piece of that many floats and returns its place; after allocate(), at(place) is its address.
  int64_t plan(int64_t floats) {
    const int64_t place = size_;
    size_ += (floats + 15) / 16 * 16;  // pieces begin at cache lines
    return place;
  }

  bool allocate() {
    const size_t bytes = static_cast<size_t>(size_ + 16) * sizeof(float);
    memory_ = static_cast<float*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    return memory_ != nullptr;
  }

  float* at(int64_t place) const { return memory_ + place; }

 private:
  int64_t size_ = 0;
  float* memory_ = nullptr;
};

}  // namespace LMOPT_INSTRUCTION_SET
}  // namespace lmopt
