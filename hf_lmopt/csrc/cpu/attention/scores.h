// Scores of 64 keys and up to 64 queries: scores[key][query], -inf where the query does not see the key.
//
// Without softcap and bias they are left as plain products; see exponent.h.
#pragma once

#include "cpu/attention/exponent.h"
#include "cpu/attention/key_blocks.h"
#include "cpu/attention/seen_groups.h"

namespace lmopt {
namespace LMOPT_INSTRUCTION_SET {

template <class Products>
class Scores {
 public:
  explicit Scores(const AttentionCall& call) : call_(call) {}

  void plan(Workspace& workspace) {
    bias_place_ = workspace.plan(call_.bias.data == nullptr ? 0 : kBlockFloats);
    bias_rows_place_ = workspace.plan(call_.bias.data == nullptr ? 0 : kBlockFloats);
  }

  void take(const Workspace& workspace) {
    bias_ = workspace.at(bias_place_);
    bias_rows_ = workspace.at(bias_rows_place_);
  }

  // `query` is [words][64]; row_max grows. `slope`, if not null, gets the derivative of the softcap, [key][query].
  void compute(
      const float* query, const WordRows& keys, int num_keys, const QueryBlock& block, int64_t key_block,
      const SeenKeys& seen, float* scores, float* row_max, float* slope = nullptr) const {
    if (call_.bias.data != nullptr) load_bias(block, key_block, num_keys);
    for_each_seen_group(seen, num_keys, [&](int first, int count, int first_panel, int end_panel) {
      for_each_tile_of_panels(first_panel, end_panel, [&](auto panels, int panel) {
        constexpr int kTilePanels = decltype(panels)::kValue;
        const WordRows rows{keys.data + first * keys.row_bytes, keys.row_bytes};
        const int64_t offset = first * kAttentionBlock + panel * kPanel;
        const uint64_t* words = seen.state == BlockState::full ? nullptr : seen.words + first;
        if (!has_plain_scores(call_)) {
          multiply_keys<kTilePanels, false>(
              query + panel * kPanel, rows, count, nullptr, panel, scores + offset, nullptr);
          finish<kTilePanels>(count, words, panel, offset, scores, row_max + panel * kPanel, slope);
        } else if (words != nullptr) {
          multiply_keys<kTilePanels, true>(
              query + panel * kPanel, rows, count, words, panel, scores + offset, row_max + panel * kPanel);
        } else {
          multiply_keys<kTilePanels, false>(
              query + panel * kPanel, rows, count, nullptr, panel, scores + offset, row_max + panel * kPanel);
        }
      });
    });
  }

 private:
  template <int panels, bool has_words>
  __attribute__((noinline)) void multiply_keys(
      const float* query, const WordRows& keys, int count, const uint64_t* words, int panel, float* scores,
      float* row_max) const {
    constexpr int kVectors = panels * kVectorsPerPanel;
    Vector maxima[kVectors];
    for (int v = 0; v < kVectors; ++v) maxima[v] = row_max == nullptr ? Vector{} : load(row_max + v * kLanes);
    const int64_t steps = words_per_row<Products>(call_.head_size);
    for_each_tile_of_rows<kTileRows<panels>>(count, [&](auto tile, int64_t first) {
      constexpr int kRows = decltype(tile)::kValue;
      Vector sum[kRows][kVectors];
      set_zero(sum);
      multiply<Products>(
          keys.data + first * keys.row_bytes, keys.row_bytes, 4, query, kAttentionBlock, steps, sum);
      LMOPT_UNROLL
      for (int row = 0; row < kRows; ++row) {
        LMOPT_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          Vector score = sum[row][v];
          if constexpr (has_words) {
            const uint64_t bits = words[first + row] >> (panel * kPanel + v * kLanes);
            score = select_by_bits(static_cast<uint32_t>(bits), score, broadcast(-kInfinity));
          }
          maxima[v] = maximum(score, maxima[v]);
          store(scores + (first + row) * kAttentionBlock + v * kLanes, score);
        }
      }
    });
    if (row_max == nullptr) return;
    for (int v = 0; v < kVectors; ++v) store(row_max + v * kLanes, maxima[v]);
  }

  // Scale, softcap, bias and mask.
  template <int panels>
  __attribute__((noinline)) void finish(
      int count, const uint64_t* words, int panel, int64_t offset, float* scores, float* row_max, float* slope) const {
    const float cap = call_.softcap, into_cap = cap == 0 ? 0 : call_.scale / cap;
    for (int v = 0; v < panels * kVectorsPerPanel; ++v) {
      Vector maxima = load(row_max + v * kLanes);
      for (int k = 0; k < count; ++k) {
        const int64_t place = offset + k * kAttentionBlock + v * kLanes;
        Vector score = load(scores + place);
        if (cap == 0) {
          score = score * call_.scale;
        } else {
          const Vector bounded = tanh(score * into_cap);
          if (slope != nullptr) store(slope + place, 1.0f - bounded * bounded);
          score = bounded * cap;
        }
        if (call_.bias.data != nullptr) score = score + load(bias_ + place);
        if (words != nullptr) {
          const uint64_t bits = words[k] >> (panel * kPanel + v * kLanes);
          score = select_by_bits(static_cast<uint32_t>(bits), score, broadcast(-kInfinity));
        }
        maxima = maximum(score, maxima);
        store(scores + place, score);
      }
      store(row_max + v * kLanes, maxima);
    }
  }

  // bias_[key][query], of the same places as the scores.
  void load_bias(const QueryBlock& block, int64_t key_block, int num_keys) const {
    const AttentionBias& bias = call_.bias;
    const int rows = block.num_panels() * kPanel;
    for (int row = 0; row < rows; ++row) {
      float* target = bias_rows_ + row * kAttentionBlock;
      std::memset(target, 0, kAttentionBlock * sizeof(float));
      if (row >= block.num_rows()) continue;
      const int64_t element = block.batch * bias.batch_stride + block.head_of(row) * bias.head_stride +
          block.query_of(row) * bias.row_stride + key_block * kAttentionBlock;
      to_float32(bias.type, static_cast<const char*>(bias.data) + element * size_of(bias.type), target, num_keys);
    }
    for (int row = 0; row < rows; row += kPanel) {
      for (int key = 0; key < kAttentionBlock; key += kPanel) {
        transpose_square(
            bias_rows_ + row * kAttentionBlock + key, kAttentionBlock, bias_ + key * kAttentionBlock + row,
            kAttentionBlock);
      }
    }
  }

  const AttentionCall& call_;
  int64_t bias_place_ = 0, bias_rows_place_ = 0;
  float* bias_ = nullptr;
  float* bias_rows_ = nullptr;
};

}  // namespace LMOPT_INSTRUCTION_SET
}  // namespace lmopt
