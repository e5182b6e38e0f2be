// The gradient of the bias: dS, added up over the dimensions in which the bias is broadcast.
//
// In a pass of its own, which computes dS once more: so each sum has one owner, which keeps it deterministic at any
// number of threads, and whoever asks for no such gradient pays nothing.
#pragma once

#include "cpu/attention/backward.h"

namespace lmopt {
namespace LMOPT_INSTRUCTION_SET {

// A task is a block of rows of the bias: 64 queries, or the only row.
template <class Products>
class BiasGradient {
 public:
  explicit BiasGradient(const BackwardProblem& problem)
      : problem_(problem),
        call_(problem.call),
        keys_(call_, call_.key, KeyArrangement::rows),
        values_(call_, call_.value, KeyArrangement::rows),
        queries_(call_, problem.gradients.output_gradient, problem.delta),
        score_gradients_(call_),
        finder_(*call_.visibility) {
    keys_.plan(workspace_);
    values_.plan(workspace_);
    queries_.plan(workspace_, 1);
    score_gradients_.plan(workspace_);
    sum_place_ = workspace_.plan(num_attention_blocks(call_.num_keys) * kBlockFloats);
  }

  bool allocate() {
    if (!workspace_.allocate()) return false;
    keys_.take(workspace_);
    values_.take(workspace_);
    queries_.take(workspace_);
    score_gradients_.take(workspace_);
    sum_ = workspace_.at(sum_place_);
    return true;
  }

  static int64_t num_tasks(const BackwardProblem& problem) {
    const AttentionGradients& gradients = problem.gradients;
    return gradients.bias_batch_size * gradients.bias_num_heads * row_blocks(problem);
  }

  void run(int64_t task) {
    const AttentionGradients& gradients = problem_.gradients;
    const int64_t row_block = task % row_blocks(problem_), entry = task / row_blocks(problem_);
    const int64_t bias_head = entry % gradients.bias_num_heads, bias_batch = entry / gradients.bias_num_heads;
    std::memset(sum_, 0, num_attention_blocks(call_.num_keys) * kBlockFloats * sizeof(float));
    for (int64_t batch = 0; batch < call_.batch_size; ++batch) {
      if (gradients.bias_batch_size != 1 && batch != bias_batch) continue;
      for (int64_t head = 0; head < call_.num_heads; ++head) {
        if (gradients.bias_num_heads != 1 && head != bias_head) continue;
        for (int64_t i = 0; i < problem_.query_blocks(); ++i) {
          if (has_rows(problem_) && i != row_block) continue;
          add(problem_.query_block(batch, head, i));
        }
      }
    }
    store(entry, row_block);
  }

 private:
  static bool has_rows(const BackwardProblem& problem) {
    return problem.gradients.bias_num_queries == problem.call.num_queries && problem.call.num_queries > 1;
  }
  static int64_t row_blocks(const BackwardProblem& problem) { return has_rows(problem) ? problem.query_blocks() : 1; }

  void add(const QueryBlock& block) {
    const int64_t key_head = block.first_head / (call_.num_heads / call_.num_key_heads);
    keys_.set_head(block.batch, key_head);
    values_.set_head(block.batch, key_head);
    finder_.set_queries(block);
    queries_.load(block, 0);
    for (int64_t key_block = finder_.first_block(); key_block < finder_.end_block(); ++key_block) {
      finder_.find(key_block, seen_);
      if (seen_.state == BlockState::empty) continue;
      float* sum = sum_ + key_block * kBlockFloats;
      score_gradients_.compute(
          queries_.block(0), keys_.block(key_block), values_.block(key_block),
          call_.visibility->keys_in_block(key_block), block, key_block, seen_,
          [&](int key, int count, int lane, const Vector*, const Vector* score_gradients, const Vector*) {
            for (int i = 0; i < count; ++i) {
              float* target = sum + (key + i) * kAttentionBlock + lane;
              LMOPT_INSTRUCTION_SET::store(target, load(target) + score_gradients[i]);
            }
          });
    }
  }

  void store(int64_t entry, int64_t row_block) const {
    const int64_t num_queries = problem_.gradients.bias_num_queries, num_keys = call_.num_keys;
    const int64_t first = row_block * kAttentionBlock, left = num_queries - first;
    const int count = static_cast<int>(left < kAttentionBlock ? left : kAttentionBlock);
    float* target = problem_.gradients.bias + (entry * num_queries + first) * num_keys;
    for (int64_t key = 0; key < num_keys; ++key) {
      const float* sums = sum_ + key * kAttentionBlock;
      if (has_rows(problem_)) {
        for (int row = 0; row < count; ++row) target[row * num_keys + key] = sums[row];
      } else {
        target[key] = 0;
        for (int row = 0; row < kAttentionBlock; ++row) target[key] += sums[row];
      }
    }
  }

  const BackwardProblem& problem_;
  const AttentionCall& call_;
  Workspace workspace_;
  KeyBlocks<Products> keys_, values_;
  HeadQueries<Products> queries_;
  ScoreGradients<Products> score_gradients_;
  KeyFinder finder_;
  SeenKeys seen_;
  int64_t sum_place_ = 0;
  float* sum_ = nullptr;  // [keys][64 queries]
};

}  // namespace LMOPT_INSTRUCTION_SET
}  // namespace lmopt
