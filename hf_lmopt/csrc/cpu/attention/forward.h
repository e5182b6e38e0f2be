// Forward attention of blocks of up to 64 queries, in steps of up to 256 keys:
//
//   S = Q K'                  [key][query]
//   m_new = max(m, max S)     l = l 2^(m - m_new) + sum 2^(S - m_new)     O = O 2^(m - m_new) + V' 2^(S - m_new)
//
// (Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867; Dao 2023, https://arxiv.org/abs/2307.08691). The
// first step takes the exact maximum, later ones may keep an older one (lazy_weights.h). O is kept as [head size][query].
// The sum over keys is added up by blocks, which keeps float32 as exact as torch's.
#pragma once

#include "cpu/attention/key_sums.h"
#include "cpu/attention/step_weights.h"

namespace lmopt {
namespace LMOPT_INSTRUCTION_SET {

template <class Products>
class Forward {
 public:
  explicit Forward(const AttentionCall& call)
      : call_(call),
        keys_(call, call.key, KeyArrangement::rows),
        values_(call, call.value, KeyArrangement::pairs),
        weights_(call),
        value_sums_(call.head_size),
        finder_(*call.visibility) {
    const int64_t words = round_up(words_per_row<Products>(call.head_size), kPanel);
    const int64_t padded_head = padded_head_rows(call.head_size);
    keys_.plan(workspace_);
    values_.plan(workspace_);
    weights_.plan(workspace_);
    query_place_ = workspace_.plan(words * kAttentionBlock);
    output_place_ = workspace_.plan(padded_head * kAttentionBlock);
    staging_place_ = workspace_.plan(padded_head * kAttentionBlock);
    rows_place_ = workspace_.plan(3 * kAttentionBlock);
  }

  bool allocate() {
    if (!workspace_.allocate()) return false;
    keys_.take(workspace_);
    values_.take(workspace_);
    weights_.take(workspace_);
    query_ = workspace_.at(query_place_);
    staging_ = workspace_.at(staging_place_);
    rows_ = {workspace_.at(rows_place_), workspace_.at(rows_place_) + kAttentionBlock, workspace_.at(output_place_)};
    factors_ = rows_.row_sum + kAttentionBlock;
    return true;
  }

  // Goes over the keys of blocks [first_block, end_block) that the queries see.
  void run(const QueryBlock& block, int64_t first_block, int64_t end_block) {
    start(block);
    if (finder_.first_block() > first_block) first_block = finder_.first_block();
    if (finder_.end_block() < end_block) end_block = finder_.end_block();
    int count = 0;
    for (int64_t key_block = first_block; key_block < end_block; ++key_block) {
      SeenKeys& seen = step_[count].seen;
      finder_.find(key_block, seen);
      if (seen.state == BlockState::empty) continue;
      step_[count++].key_block = key_block;
      if (count == kStepBlocks) step(count), count = 0;
    }
    if (count > 0) step(count);
  }

  const RunningRows& rows() const { return rows_; }

  // Writes output and logsumexp.
  void finish(const RunningRows& rows) {
    const int count = block_.num_rows();
    float row_max[kAttentionBlock], log_sum[kAttentionBlock];
    const double unit = call_.sinks == nullptr ? score_scale(call_) : 1;
    for (int row = 0; row < kAttentionBlock; row += kLanes) divide(rows, row, count, row_max, log_sum);
    for (int row = 0; row < count; ++row) {
      const int64_t head_row = block_.batch * call_.num_heads + block_.head_of(row);
      // Rounded once: the backward pass takes all weights of the row from it.
      const double logsumexp = static_cast<double>(row_max[row]) * unit + log_sum[row];
      call_.logsumexp[head_row * call_.num_queries + block_.query_of(row)] = static_cast<float>(logsumexp);
    }
    store_transposed<Products>(
        rows.output, factors_, call_.type, call_.head_size, count,
        [&](int row) {
          return writable_row(call_.output, call_.type, block_.batch, block_.head_of(row), block_.query_of(row));
        },
        staging_);
  }

  // Without the query itself, for finish() alone.
  void set_block(const QueryBlock& block) { block_ = block; }

 private:
  void start(const QueryBlock& block) {
    set_block(block);
    const int64_t key_head = block.first_head / (call_.num_heads / call_.num_key_heads);
    keys_.set_head(block.batch, key_head);
    values_.set_head(block.batch, key_head);
    finder_.set_queries(block);
    load_transposed<Products>(
        call_.type, call_.head_size, block.num_rows(),
        [&](int row) {
          return row_address(call_.query, call_.type, block.batch, block.head_of(row), block.query_of(row));
        },
        staging_, query_);
    for (int row = 0; row < kAttentionBlock; ++row) rows_.row_max[row] = -kInfinity, rows_.row_sum[row] = 0;
    std::memset(rows_.output, 0, padded_head_rows(call_.head_size) * kAttentionBlock * sizeof(float));
  }

  int num_keys(int64_t key_block) const { return call_.visibility->keys_in_block(key_block); }

  void step(int count) {
    constexpr int64_t kWeightFloats = StepWeights<Products>::kWeightFloats;
    const float* weights = weights_.compute(block_, query_, keys_, step_, count, rows_);
    for (int i = 0, end; i < count; i = end) {
      const WordRows values = values_.block(step_[i].key_block);
      int64_t keys = num_keys(step_[i].key_block);
      for (end = i + 1; end < count && continues(step_[end - 1], step_[end]); ++end) {
        keys += num_keys(step_[end].key_block);
      }
      value_sums_.add(step_[i].seen, keys, block_.num_panels(), values, weights + i * kWeightFloats, rows_.output);
    }
  }

  // Whether one product can go over both blocks.
  bool continues(const StepBlock& block, const StepBlock& next) {
    if (block.seen.state != BlockState::full || next.seen.state != BlockState::full) return false;
    if (block.key_block + 1 != next.key_block) return false;
    const WordRows rows = values_.block(block.key_block), next_rows = values_.block(next.key_block);
    const int64_t bytes = kAttentionBlock / Products::kPerWord * rows.row_bytes;
    return rows.row_bytes == next_rows.row_bytes && rows.data + bytes == next_rows.data;
  }

  // factors_ becomes what the output is multiplied by: 1 / (sum (1 - p)), 0 where nothing is seen.
  // The logsumexp is maximum + log_sum, the maximum in units of scores, or as a score if there are sinks.
  void divide(const RunningRows& rows, int row, int count, float* maxima, float* log_sum) {
    Vector row_max = load(rows.row_max + row), sum = load(rows.row_sum + row), factor = broadcast(1.0f);
    if (call_.sinks != nullptr) {
      Vector sink{};
      for (int i = 0; i < kLanes && row + i < count; ++i) sink[i] = call_.sinks[block_.head_of(row + i)];
      row_max = row_max * score_scale(call_);
      const Vector grown = maximum(maximum(row_max, sink), broadcast(-1e30f));  // not -inf - -inf
      factor = exp2((row_max - grown) * kLog2E);
      sum = multiply_add(sum, factor, exp2((sink - grown) * kLog2E));
      row_max = grown;
    }
    const auto is_seen = sum != Vector{};  // also NaN, which must come out
    const Vector total = is_seen ? sum : broadcast(1.0f);
    const float keep_scale = static_cast<float>(1.0 / (1.0 - call_.dropout_p));
    store(factors_ + row, is_seen ? factor * keep_scale / total : Vector{});
    store(maxima + row, is_seen ? row_max : broadcast(-kInfinity));
    store(log_sum + row, log(total) + (total - total));  // log takes NaN for a number
  }

  const AttentionCall& call_;
  Workspace workspace_;
  KeyBlocks<Products> keys_, values_;
  StepWeights<Products> weights_;
  KeySums<Products> value_sums_;
  KeyFinder finder_;
  QueryBlock block_{};
  StepBlock step_[kStepBlocks];
  int64_t query_place_, output_place_, staging_place_, rows_place_;
  float *query_ = nullptr, *staging_ = nullptr, *factors_ = nullptr;
  RunningRows rows_{};
};

}  // namespace LMOPT_INSTRUCTION_SET
}  // namespace lmopt
