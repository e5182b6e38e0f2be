// Weights straight from the registers in which their scores arise, by the maximum that a row had before.
//
// Where the largest weight of each row has grown by less than 2^8, that maximum is as good as the new one, and scores
// are neither written nor read again. Where one has grown by more, the caller starts again.
#pragma once

#include "cpu/attention/exponent.h"
#include "cpu/attention/key_blocks.h"

namespace lmopt {
namespace LMOPT_INSTRUCTION_SET {

constexpr float kLazyGrowth = 8;  // in powers of 2

// For keys that all queries see: adds to row_sum, and raises row_max_seen, both [64].
template <class Products>
class LazyWeights {
 public:
  explicit LazyWeights(const AttentionCall& call) : call_(call) {}

  void compute(
      const float* query, const WordRows& keys, int num_keys, int num_panels, const float* row_max, float* weights,
      float* row_max_seen, float* row_sum) const {
    for_each_tile_of_panels(0, num_panels, [&](auto panels, int panel) {
      const int lane = panel * kPanel;
      multiply<decltype(panels)::kValue>(
          query + lane, keys, num_keys, row_max + lane, weights + lane, row_max_seen + lane, row_sum + lane);
    });
  }

 private:
  template <int panels>
  __attribute__((noinline)) void multiply(
      const float* query, const WordRows& keys, int num_keys, const float* row_max, float* weights,
      float* row_max_seen, float* row_sum) const {
    constexpr int kVectors = panels * kVectorsPerPanel;
    const int64_t steps = words_per_row<Products>(call_.head_size);
    const Vector scale = broadcast(exponent_scale(call_));
    for_each_tile_of_rows<kTileRows<panels>>(num_keys, [&](auto tile, int64_t first) {
      constexpr int kRows = decltype(tile)::kValue;
      Vector sum[kRows][kVectors];
      set_zero(sum);
      LMOPT_INSTRUCTION_SET::multiply<Products>(
          keys.data + first * keys.row_bytes, keys.row_bytes, 4, query, kAttentionBlock, steps, sum);
      LMOPT_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const Vector old = load(row_max + v * kLanes);
        Vector seen = load(row_max_seen + v * kLanes), total = load(row_sum + v * kLanes);
        float* target = weights + first / Products::kPerWord * kAttentionBlock + v * kLanes;
        LMOPT_UNROLL
        for (int row = 0; row < kRows; row += Products::kPerWord, target += kAttentionBlock) {
          const Vector power = take_power(sum[row][v], old, scale, seen, total);
          if constexpr (Products::kIsBfloat16) {
            constexpr int kLast = kRows - 1;
            Vector odd{};
            if (row < kLast) odd = take_power(sum[row < kLast ? row + 1 : row][v], old, scale, seen, total);
            store(target, Products::pair(power, odd));
          } else {
            store(target, power);
          }
        }
        store(row_max_seen + v * kLanes, seen);
        store(row_sum + v * kLanes, total);
      }
    });
  }

  static LMOPT_INLINE Vector take_power(Vector score, Vector row_max, Vector scale, Vector& seen, Vector& total) {
    seen = maximum(score, seen);
    const Vector power = exp2<Products::kIsBfloat16>((score - row_max) * scale);
    total += power;
    return power;
  }

  const AttentionCall& call_;
};

}  // namespace LMOPT_INSTRUCTION_SET
}  // namespace lmopt
