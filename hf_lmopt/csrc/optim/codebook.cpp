#include "optim/codebook.h"

#include <algorithm>
#include <cmath>

namespace lmopt {

Codebook::Codebook(const float* ascending_values) {
  std::copy_n(ascending_values, 256, values);
  // Written so that a NaN is refused.
  is_valid = std::is_sorted(values, values + 256) &&
      std::all_of(values, values + 256, [](float value) { return std::fabs(value) <= 1.0f; });
  tree[0] = 0.0f;
  for (int first = 1, stride = 256; first < 256; first *= 2, stride /= 2) {
    for (int node = 0; node < first; ++node) {
      const int right = node * stride + stride / 2;
      const float left = values[right - 1];
      // A second moment that is not 0 must not become 0, since the step divides by its root.
      tree[first + node] = right == 1 && left == 0.0f ? 0.0f : 0.5f * (left + values[right]);
    }
  }
}

}  // namespace lmopt
