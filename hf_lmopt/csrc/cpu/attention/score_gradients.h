// Weights and the gradient of scores, for 64 keys and up to 64 queries, recomputed from the logsumexp (Dao et al.
// 2022, https://arxiv.org/abs/2205.14135):
//
//   P = 2^(S - logsumexp)      dP = V dO'      dS = P (dP kept / (1 - p) - delta)      delta = dO O - dlogsumexp
#pragma once

#include "cpu/attention/dropout.h"
#include "cpu/attention/query_rows.h"
#include "cpu/attention/scores.h"

namespace lmopt {
namespace LMOPT_INSTRUCTION_SET {

template <class Products>
class ScoreGradients {
 public:
  explicit ScoreGradients(const AttentionCall& call) : call_(call), scores_(call), dropout_(call) {}

  void plan(Workspace& workspace) {
    scores_.plan(workspace);
    scores_place_ = workspace.plan(kBlockFloats);
    slope_place_ = workspace.plan(call_.softcap == 0 ? 0 : kBlockFloats);
    row_max_place_ = workspace.plan(kAttentionBlock);
  }

  void take(const Workspace& workspace) {
    scores_.take(workspace);
    score_block_ = workspace.at(scores_place_);
    slope_ = call_.softcap == 0 ? nullptr : workspace.at(slope_place_);
    row_max_ = workspace.at(row_max_place_);
  }

  // Calls emit(key, number of keys, lane, weights, gradients, slopes) for vectors of up to two neighbouring keys, the
  // first an even one: the weights after dropout, the gradients before the softcap's slope. Only for what is seen.
  template <class Emit>
  void compute(
      const QueryRows& queries, const WordRows& keys, const WordRows& values, int num_keys, const QueryBlock& block,
      int64_t key_block, const SeenKeys& seen, const Emit& emit) {
    scores_.compute(
        queries.query_lanes, keys, num_keys, block, key_block, seen, score_block_, row_max_, slope_);
    const bool has_dropout = call_.dropout_p > 0;
    if (has_dropout) dropout_.find_kept(block, key_block, kept_);
    for_each_seen_group(seen, num_keys, [&](int first, int count, int first_panel, int end_panel) {
      const WordRows rows{values.data + first * values.row_bytes, values.row_bytes};
      for_each_tile_of_panels(first_panel, end_panel, [&](auto panels, int panel) {
        constexpr int kTilePanels = decltype(panels)::kValue;
        if (has_dropout) {
          multiply_values<kTilePanels, true>(queries, rows, first, count, panel, emit);
        } else {
          multiply_values<kTilePanels, false>(queries, rows, first, count, panel, emit);
        }
      });
    });
  }

 private:
  template <int panels, bool has_dropout, class Emit>
  __attribute__((noinline)) void multiply_values(
      const QueryRows& queries, const WordRows& values, int first_key, int count, int panel, const Emit& emit) const {
    constexpr int kVectors = panels * kVectorsPerPanel;
    const int64_t steps = words_per_row<Products>(call_.head_size);
    for_each_tile_of_rows<kTileRows<panels>>(count, [&](auto tile, int64_t first) {
      constexpr int kRows = decltype(tile)::kValue;
      Vector sum[kRows][kVectors];
      set_zero(sum);
      multiply<Products>(
          values.data + first * values.row_bytes, values.row_bytes, 4, queries.gradient_lanes + panel * kPanel,
          kAttentionBlock, steps, sum);
      LMOPT_UNROLL
      for (int row = 0; row < kRows; row += 2) {
        constexpr int kLast = kRows - 1;
        LMOPT_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          const int key = first_key + static_cast<int>(first) + row, lane = panel * kPanel + v * kLanes;
          Vector weights[2] = {}, gradients[2] = {}, slopes[2] = {};
          finish<has_dropout>(queries, key, lane, sum[row][v], weights[0], gradients[0], slopes[0]);
          if (row < kLast) {
            finish<has_dropout>(
                queries, key + 1, lane, sum[row < kLast ? row + 1 : row][v], weights[1], gradients[1], slopes[1]);
          }
          emit(key, row < kLast ? 2 : 1, lane, weights, gradients, slopes);
        }
      }
    });
  }

  template <bool has_dropout>
  LMOPT_INLINE void finish(
      const QueryRows& queries, int key, int lane, Vector product, Vector& weight, Vector& gradient,
      Vector& slope) const {
    const int64_t place = key * kAttentionBlock + lane;
    const Vector below = load(score_block_ + place) - load(queries.logsumexp + lane);
    const Vector exponent = (below - load(queries.logsumexp_rest + lane)) * exponent_scale(call_);
    const Vector power = exp2<Products::kIsBfloat16>(exponent);
    weight = power;
    if constexpr (has_dropout) {
      const float keep_scale = static_cast<float>(1.0 / (1.0 - call_.dropout_p));
      const Vector kept = select_by_bits(static_cast<uint32_t>(kept_[key] >> lane), broadcast(keep_scale), Vector{});
      weight = power * kept;
      product = product * kept;
    }
    gradient = power * (product - load(queries.delta + lane));
    if (slope_ != nullptr) slope = load(slope_ + place);
  }

  const AttentionCall& call_;
  Scores<Products> scores_;
  Dropout dropout_;
  int64_t scores_place_ = 0, slope_place_ = 0, row_max_place_ = 0;
  float *score_block_ = nullptr, *slope_ = nullptr, *row_max_ = nullptr;
  uint64_t kept_[kAttentionBlock];
};

}  // namespace LMOPT_INSTRUCTION_SET
}  // namespace lmopt
