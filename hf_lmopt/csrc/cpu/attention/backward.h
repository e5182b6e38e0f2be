// Backward attention of one key head over a range of its keys: for each query head that reads it, key blocks outside,
// query blocks inside.
//
//   dV = P' dO      dK = dS' Q scale      dQ = dS K scale          (Dao et al. 2022, https://arxiv.org/abs/2205.14135)
//
// Sums are kept in float32: dK and dV of the whole range, [key][head size], and dQ of a head, [head size][query].
#pragma once

#include "cpu/attention/key_sums.h"
#include "cpu/attention/score_gradients.h"
#include "cpu/attention/tasks.h"

namespace lmopt {
namespace LMOPT_INSTRUCTION_SET {

constexpr int kOuterKeyBlocks = 3;  // that share one pass over the queries

struct BackwardProblem {
  const AttentionCall& call;
  const AttentionGradients& gradients;
  const float* delta;  // [B, Hq, Lq]
  int64_t num_parts;   // of the keys
  // [B, Hq, parts, query blocks, head size rounded up to 32, 64], or null for one part.
  float* query_gradient_parts;

  int64_t query_blocks() const { return num_attention_blocks(call.num_queries); }
  int64_t query_gradient_floats() const { return padded_head_rows(call.head_size) * kAttentionBlock; }

  QueryBlock query_block(int64_t batch, int64_t head, int64_t index) const {
    const int64_t first = index * kAttentionBlock, left = call.num_queries - first;
    return {batch, head, first, static_cast<int>(left < kAttentionBlock ? left : kAttentionBlock), 1};
  }
};

// Writes dQ of a block from its sum.
template <class Products>
inline void store_query_gradient(
    const BackwardProblem& problem, const QueryBlock& block, const float* sum, float* staging) {
  float factors[kAttentionBlock];
  for (float& factor : factors) factor = problem.call.scale;
  store_transposed<Products>(
      sum, factors, problem.call.type, problem.call.head_size, block.num_queries,
      [&](int row) {
        return writable_row(
            problem.gradients.query, problem.call.type, block.batch, block.first_head, block.first_query + row);
      },
      staging);
}

template <class Products>
class Backward {
 public:
  explicit Backward(const BackwardProblem& problem)
      : problem_(problem),
        call_(problem.call),
        padded_head_(round_up(call_.head_size, kPanel)),
        keys_(call_, call_.key, KeyArrangement::rows),
        key_pairs_(call_, call_.key, KeyArrangement::pairs),
        values_(call_, call_.value, KeyArrangement::rows),
        queries_(call_, problem.gradients.output_gradient, problem.delta),
        score_gradients_(call_),
        query_sums_(call_.head_size),
        finder_(*call_.visibility) {
    const int64_t part_blocks = num_attention_blocks(call_.num_keys) / problem.num_parts + 1;
    keys_.plan(workspace_);
    key_pairs_.plan(workspace_);
    values_.plan(workspace_);
    queries_.plan(workspace_, problem.query_blocks());
    score_gradients_.plan(workspace_);
    weights_place_ = workspace_.plan(kBlockFloats);
    gradients_place_ = workspace_.plan(kBlockFloats);
    pairs_place_ = workspace_.plan(Products::kIsBfloat16 ? kBlockFloats : 0);
    key_place_ = workspace_.plan(part_blocks * kAttentionBlock * padded_head_);
    value_place_ = workspace_.plan(part_blocks * kAttentionBlock * padded_head_);
    query_place_ = workspace_.plan(
        problem.query_gradient_parts != nullptr ? 0 : problem.query_blocks() * problem.query_gradient_floats());
    staging_place_ = workspace_.plan(kPanel * padded_head_);
  }

  bool allocate() {
    if (!workspace_.allocate()) return false;
    keys_.take(workspace_);
    key_pairs_.take(workspace_);
    values_.take(workspace_);
    queries_.take(workspace_);
    score_gradients_.take(workspace_);
    weights_ = workspace_.at(weights_place_);
    gradients_ = workspace_.at(gradients_place_);
    pairs_ = Products::kIsBfloat16 ? workspace_.at(pairs_place_) : gradients_;
    key_gradient_ = workspace_.at(key_place_);
    value_gradient_ = workspace_.at(value_place_);
    staging_ = workspace_.at(staging_place_);
    return true;
  }

  void run(int64_t task) {
    const int64_t part = task % problem_.num_parts, pair = task / problem_.num_parts;
    const int64_t batch = pair / call_.num_key_heads, key_head = pair % call_.num_key_heads;
    const int64_t key_blocks = num_attention_blocks(call_.num_keys);
    const int64_t group_size = call_.num_heads / call_.num_key_heads;
    first_block_ = part * key_blocks / problem_.num_parts;
    end_block_ = (part + 1) * key_blocks / problem_.num_parts;
    const int64_t floats = (end_block_ - first_block_) * kAttentionBlock * padded_head_;
    std::memset(key_gradient_, 0, floats * sizeof(float));
    std::memset(value_gradient_, 0, floats * sizeof(float));
    keys_.set_head(batch, key_head);
    key_pairs_.set_head(batch, key_head);
    values_.set_head(batch, key_head);
    for (int64_t head = key_head * group_size; head < (key_head + 1) * group_size; ++head) {
      run_head(batch, head, part);
    }
    store_rows(problem_.gradients.key, batch, key_head, key_gradient_, call_.scale);
    store_rows(problem_.gradients.value, batch, key_head, value_gradient_, 1);
  }

 private:
  void run_head(int64_t batch, int64_t head, int64_t part) {
    const int64_t query_blocks = problem_.query_blocks(), block_floats = problem_.query_gradient_floats();
    query_gradient_ = workspace_.at(query_place_);
    if (problem_.query_gradient_parts != nullptr) {
      const int64_t index = (batch * call_.num_heads + head) * problem_.num_parts + part;
      query_gradient_ = problem_.query_gradient_parts + index * query_blocks * block_floats;
    }
    std::memset(query_gradient_, 0, query_blocks * block_floats * sizeof(float));
    for (int64_t i = 0; i < query_blocks; ++i) queries_.load(problem_.query_block(batch, head, i), i);
    for (int64_t first = first_block_; first < end_block_; first += kOuterKeyBlocks) {
      const int64_t end = first + kOuterKeyBlocks < end_block_ ? first + kOuterKeyBlocks : end_block_;
      for (int64_t i = 0; i < query_blocks; ++i) run_blocks(problem_.query_block(batch, head, i), i, first, end);
    }
    if (problem_.query_gradient_parts != nullptr) return;
    for (int64_t i = 0; i < query_blocks; ++i) {
      store_query_gradient<Products>(
          problem_, problem_.query_block(batch, head, i), query_gradient_ + i * block_floats, staging_);
    }
  }

  void run_blocks(const QueryBlock& block, int64_t index, int64_t first, int64_t end) {
    finder_.set_queries(block);
    if (finder_.first_block() > first) first = finder_.first_block();
    if (finder_.end_block() < end) end = finder_.end_block();
    for (int64_t key_block = first; key_block < end; ++key_block) {
      finder_.find(key_block, seen_);
      if (seen_.state != BlockState::empty) run_block(block, index, key_block);
    }
  }

  void run_block(const QueryBlock& block, int64_t index, int64_t key_block) {
    const int num_keys = call_.visibility->keys_in_block(key_block);
    const QueryRows queries = queries_.block(index);
    set_unseen_to_zero(num_keys, block.num_panels());
    score_gradients_.compute(
        queries, keys_.block(key_block), values_.block(key_block), num_keys, block, key_block, seen_,
        [&](int key, int count, int lane, const Vector* weights, Vector* gradients, const Vector* slopes) {
          if (call_.softcap != 0) gradients[0] *= slopes[0], gradients[1] *= slopes[1];
          store_weights(key, count, lane, weights, gradients);
        });
    const int64_t offset = (key_block - first_block_) * kAttentionBlock * padded_head_;
    add_query_products(weights_, queries.gradient_rows, num_keys, value_gradient_ + offset);
    add_query_products(gradients_, queries.query_rows, num_keys, key_gradient_ + offset);
    query_sums_.add(
        seen_, num_keys, block.num_panels(), key_pairs_.block(key_block), pairs_,
        query_gradient_ + index * problem_.query_gradient_floats());
  }

  // dQ's products take whole panels between the first and the last group that is seen.
  void set_unseen_to_zero(int num_keys, int num_panels) {
    if (seen_.state == BlockState::full) return;
    for (int group = 0; group * kGroup < num_keys; ++group) {
      for (int panel = 0; panel < num_panels; ++panel) {
        if (panel >= seen_.first_panel[group] && panel < seen_.end_panel[group]) continue;
        for (int row = 0; row < kGroup / Products::kPerWord; ++row) {
          float* target = pairs_ + (group * kGroup / Products::kPerWord + row) * kAttentionBlock + panel * kPanel;
          std::memset(target, 0, kPanel * sizeof(float));
        }
      }
    }
  }

  LMOPT_INLINE void store_weights(int key, int count, int lane, const Vector* weights, const Vector* gradients) {
    if constexpr (Products::kIsBfloat16) {
      for (int i = 0; i < count; ++i) {
        Products::store_neighbours(weights_ + (key + i) * kRowWords + lane / 2, weights[i]);
        Products::store_neighbours(gradients_ + (key + i) * kRowWords + lane / 2, gradients[i]);
      }
      store(pairs_ + key / 2 * kAttentionBlock + lane, Products::pair(gradients[0], gradients[1]));
    } else {
      for (int i = 0; i < count; ++i) {
        store(weights_ + (key + i) * kRowWords + lane, weights[i]);
        store(gradients_ + (key + i) * kRowWords + lane, gradients[i]);
      }
    }
  }

  // sum[key][i] += sum over queries of factors[key][query] rows[query][i].
  void add_query_products(const float* factors, const float* rows, int num_keys, float* sum) const {
    for_each_seen_group(seen_, num_keys, [&](int first, int count, int first_panel, int end_panel) {
      const int64_t first_word = first_panel * kPanel / Products::kPerWord;
      const int64_t steps = (end_panel - first_panel) * kPanel / Products::kPerWord;
      const int num_panels = static_cast<int>(padded_head_ / kPanel);
      for (int panel = 0; panel < num_panels; panel += kPanels) {
        const int end = panel + kPanels < num_panels ? panel + kPanels : num_panels;
        for_each_tile_of_panels(panel, end, [&](auto panels, int tile_panel) {
          add_query_products_to<decltype(panels)::kValue>(
              factors + first * kRowWords + first_word, rows + first_word * padded_head_ + tile_panel * kPanel, steps,
              count, sum + first * padded_head_ + tile_panel * kPanel);
        });
      }
    });
  }

  template <int panels>
  __attribute__((noinline)) void add_query_products_to(
      const float* factors, const float* rows, int64_t steps, int num_keys, float* target) const {
    for_each_tile_of_rows<kTileRows<panels>>(num_keys, [&](auto tile, int64_t first) {
      Vector sum[decltype(tile)::kValue][panels * kVectorsPerPanel];
      set_zero(sum);
      multiply<Products>(
          reinterpret_cast<const char*>(factors + first * kRowWords), kRowWords * 4, 4, rows, padded_head_, steps,
          sum);
      add_tile(target + first * padded_head_, padded_head_, sum);
    });
  }

  void store_rows(const AttentionTensor& tensor, int64_t batch, int64_t head, float* sums, float factor) const {
    const int64_t first = first_block_ * kAttentionBlock, limit = end_block_ * kAttentionBlock;
    const int64_t end = limit < call_.num_keys ? limit : call_.num_keys;
    for (int64_t key = first; key < end; ++key, sums += padded_head_) {
      for (int64_t i = 0; i < padded_head_; ++i) sums[i] *= factor;
      from_float32(sums, call_.type, writable_row(tensor, call_.type, batch, head, key), call_.head_size);
    }
  }

  static constexpr int64_t kRowWords = kAttentionBlock / Products::kPerWord;

  const BackwardProblem& problem_;
  const AttentionCall& call_;
  const int64_t padded_head_;
  Workspace workspace_;
  KeyBlocks<Products> keys_, key_pairs_, values_;
  HeadQueries<Products> queries_;
  ScoreGradients<Products> score_gradients_;
  KeySums<Products> query_sums_;
  KeyFinder finder_;
  SeenKeys seen_;
  int64_t first_block_ = 0, end_block_ = 0;
  int64_t weights_place_, gradients_place_, pairs_place_, key_place_, value_place_, query_place_, staging_place_;
  float *weights_ = nullptr, *gradients_ = nullptr;  // [64 keys][64 queries], in pairs of queries for bfloat16
  float* pairs_ = nullptr;                           // gradients in pairs of keys
  float *key_gradient_ = nullptr, *value_gradient_ = nullptr, *query_gradient_ = nullptr, *staging_ = nullptr;
};

}  // namespace LMOPT_INSTRUCTION_SET
}  // namespace lmopt
