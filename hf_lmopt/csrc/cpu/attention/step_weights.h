// The weights of a step of up to 256 keys, and what they do to maximum, sum and output of the rows.
#pragma once

#include "cpu/attention/dropout.h"
#include "cpu/attention/lazy_weights.h"
#include "cpu/attention/scores.h"

namespace lmopt {
namespace LMOPT_INSTRUCTION_SET {

constexpr int kStepBlocks = 4;

// Of one row: the maximum in units of the scores, the sum of powers, and the output before division.
struct RunningRows {
  float* row_max;  // [64]
  float* row_sum;  // [64]
  float* output;   // [head size, rounded up to 32][64]
};

struct StepBlock {
  int64_t key_block;
  SeenKeys seen;
};

template <class Products>
class StepWeights {
 public:
  // Of a block of 64 keys.
  static constexpr int64_t kWeightFloats = kBlockFloats / Products::kPerWord;

  explicit StepWeights(const AttentionCall& call)
      : call_(call), scores_(call), lazy_weights_(call), dropout_(call) {}

  void plan(Workspace& workspace) {
    scores_.plan(workspace);
    weights_place_ = workspace.plan(kStepBlocks * kBlockFloats);
    rows_place_ = workspace.plan(2 * kAttentionBlock);
  }

  void take(const Workspace& workspace) {
    scores_.take(workspace);
    weights_ = workspace.at(weights_place_);
    step_max_ = workspace.at(rows_place_);
    factors_ = step_max_ + kAttentionBlock;
  }

  // Returns them as [key][query], float32, or bfloat16 in pairs of keys, kWeightFloats for each block.
  const float* compute(
      const QueryBlock& queries, const float* query, KeyBlocks<Products>& keys, const StepBlock* blocks, int count,
      const RunningRows& rows) {
    if (!compute_lazily(queries, query, keys, blocks, count, rows)) {
      compute_exactly(queries, query, keys, blocks, count, rows);
    }
    return weights_;
  }

 private:
  int num_keys(const StepBlock& block) const { return call_.visibility->keys_in_block(block.key_block); }

  // By the maximum that the rows have; false if that is not near enough, or not all is plainly seen.
  bool compute_lazily(
      const QueryBlock& queries, const float* query, KeyBlocks<Products>& keys, const StepBlock* blocks, int count,
      const RunningRows& rows) {
    const int lanes = queries.num_panels() * kPanel;
    if (!has_plain_scores(call_) || call_.dropout_p > 0) return false;
    for (int i = 0; i < count; ++i) {
      if (blocks[i].seen.state != BlockState::full) return false;
    }
    for (int row = 0; row < lanes; ++row) {
      if (rows.row_max[row] == -kInfinity) return false;
    }
    float* step_sum = factors_;
    for (int row = 0; row < lanes; ++row) step_max_[row] = -kInfinity, step_sum[row] = 0;
    for (int i = 0; i < count; ++i) {
      lazy_weights_.compute(
          query, keys.block(blocks[i].key_block), num_keys(blocks[i]), queries.num_panels(), rows.row_max,
          weights_ + i * kWeightFloats, step_max_, step_sum);
    }
    const float growth = kLazyGrowth / exponent_scale(call_);
    for (int row = 0; row < lanes; ++row) {
      if (!(step_max_[row] <= rows.row_max[row] + growth)) return false;
    }
    for (int row = 0; row < lanes; ++row) rows.row_sum[row] += step_sum[row];
    return true;
  }

  void compute_exactly(
      const QueryBlock& queries, const float* query, KeyBlocks<Products>& keys, const StepBlock* blocks, int count,
      const RunningRows& rows) {
    for (int row = 0; row < kAttentionBlock; ++row) step_max_[row] = -kInfinity;
    for (int i = 0; i < count; ++i) {
      scores_.compute(
          query, keys.block(blocks[i].key_block), num_keys(blocks[i]), queries, blocks[i].key_block, blocks[i].seen,
          weights_ + i * kBlockFloats, step_max_);
    }
    grow_maximum(queries.num_panels() * kPanel, rows);
    // In place: pairs take half the room, so they overwrite scores that have been read.
    for (int i = 0; i < count; ++i) {
      take_powers(queries, blocks[i], rows, weights_ + i * kBlockFloats, weights_ + i * kWeightFloats);
    }
  }

  void grow_maximum(int lanes, const RunningRows& rows) {
    bool has_grown = false;
    for (int row = 0; row < lanes; row += kLanes) {
      const Vector old = load(rows.row_max + row), grown = maximum(load(step_max_ + row), old);
      const Vector factor = grown > old ? exp2((old - grown) * exponent_scale(call_)) : broadcast(1.0f);
      store(rows.row_max + row, grown);
      store(rows.row_sum + row, load(rows.row_sum + row) * factor);
      store(factors_ + row, factor);
      for (int i = 0; i < kLanes; ++i) has_grown |= factor[i] != 1.0f && old[i] != -kInfinity;
    }
    if (has_grown) shrink_output(lanes, rows.output);
  }

  __attribute__((noinline)) void shrink_output(int lanes, float* output) const {
    for (int64_t d = 0; d < call_.head_size; ++d, output += kAttentionBlock) {
      for (int row = 0; row < lanes; row += kLanes) store(output + row, load(output + row) * load(factors_ + row));
    }
  }

  void take_powers(
      const QueryBlock& queries, const StepBlock& block, const RunningRows& rows, const float* scores,
      float* weights) const {
    const bool is_full = block.seen.state == BlockState::full, has_dropout = call_.dropout_p > 0;
    uint64_t kept[kAttentionBlock];
    if (has_dropout) dropout_.find_kept(queries, block.key_block, kept);
    for (int first = 0; first < num_keys(block); first += kGroup) {
      const int group = is_full ? 0 : first / kGroup, left = num_keys(block) - first;
      const int count = left < kGroup ? left : kGroup;
      for (int lane = 0; lane < queries.num_panels() * kPanel; lane += kLanes) {
        const int panel = lane / kPanel;
        if (panel < block.seen.first_panel[group] || panel >= block.seen.end_panel[group]) {
          set_zero(weights + lane, first, count);
        } else if (has_dropout) {
          take_powers_of_group<true>(scores + lane, weights + lane, first, count, lane, kept, rows);
        } else {
          take_powers_of_group<false>(scores + lane, weights + lane, first, count, lane, kept, rows);
        }
      }
    }
  }

  static void set_zero(float* weights, int first, int count) {
    for (int key = first; key < first + count; key += Products::kPerWord) {
      store(weights + key / Products::kPerWord * kAttentionBlock, Vector{});
    }
  }

  template <bool has_dropout>
  LMOPT_INLINE void take_powers_of_group(
      const float* scores, float* weights, int first, int count, int lane, const uint64_t* kept,
      const RunningRows& rows) const {
    // Not -inf, as where no key was seen yet: -inf - -inf is no number.
    const Vector row_max = maximum(load(rows.row_max + lane), broadcast(-1e30f));
    const Vector scale = broadcast(exponent_scale(call_));
    Vector sum{};
    const auto weight = [&](int key) {
      const Vector exponent = (load(scores + key * kAttentionBlock) - row_max) * scale;
      const Vector power = exp2<Products::kIsBfloat16>(exponent);
      sum += power;
      if constexpr (!has_dropout) return power;
      return select_by_bits(static_cast<uint32_t>(kept[key] >> lane), power, Vector{});
    };
    if constexpr (Products::kIsBfloat16) {
      for (int key = first; key < first + count; key += 2) {
        const Vector even = weight(key), odd = key + 1 < first + count ? weight(key + 1) : Vector{};
        store(weights + key / 2 * kAttentionBlock, Products::pair(even, odd));
      }
    } else {
      for (int key = first; key < first + count; ++key) store(weights + key * kAttentionBlock, weight(key));
    }
    store(rows.row_sum + lane, load(rows.row_sum + lane) + sum);
  }

  const AttentionCall& call_;
  Scores<Products> scores_;
  LazyWeights<Products> lazy_weights_;
  Dropout dropout_;
  int64_t weights_place_ = 0, rows_place_ = 0;
  float *weights_ = nullptr, *step_max_ = nullptr, *factors_ = nullptr;
};

}  // namespace LMOPT_INSTRUCTION_SET
}  // namespace lmopt
