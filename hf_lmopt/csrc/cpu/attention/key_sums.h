// Sums over keys: O of values and weights, dQ of keys and gradients.
#pragma once

#include "cpu/attention/key_blocks.h"
#include "cpu/attention/seen_groups.h"

namespace lmopt {
namespace LMOPT_INSTRUCTION_SET {

// target[i][query] += sum over keys of keys[key][i] * weights[key][query], for the keys that are seen; the
// weights of a group and a panel that sees none of it must be 0 where the panel sees groups on both sides.
template <class Products>
class KeySums {
 public:
  explicit KeySums(int64_t head_size) : head_size_(head_size) {}

  // Of one block of keys, or of several that are all seen.
  void add(
      const SeenKeys& seen, int64_t num_keys, int num_panels, const WordRows& keys, const float* weights,
      float* target) const {
    const int count = static_cast<int>(num_keys);
    for_each_seen_panels(seen, count, num_panels, [&](int first_panel, int end_panel, int first_key, int end_key) {
      const int64_t first = first_key / Products::kPerWord;
      const int64_t steps = (end_key + Products::kPerWord - 1) / Products::kPerWord - first;
      for_each_tile_of_panels(first_panel, end_panel, [&](auto panels, int panel) {
        add_panels<decltype(panels)::kValue>(
            {keys.data + first * keys.row_bytes, keys.row_bytes}, steps,
            weights + first * kAttentionBlock + panel * kPanel, target + panel * kPanel);
      });
    });
  }

 private:
  template <int panels>
  __attribute__((noinline)) void add_panels(
      const WordRows& keys, int64_t steps, const float* weights, float* target) const {
    for_each_tile_of_rows<kTileRows<panels>>(head_size_, [&](auto tile, int64_t first) {
      Vector sum[decltype(tile)::kValue][panels * kVectorsPerPanel];
      set_zero(sum);
      multiply<Products>(keys.data + first * 4, 4, keys.row_bytes, weights, kAttentionBlock, steps, sum);
      add_tile(target + first * kAttentionBlock, kAttentionBlock, sum);
    });
  }

  int64_t head_size_;
};

}  // namespace LMOPT_INSTRUCTION_SET
}  // namespace lmopt
