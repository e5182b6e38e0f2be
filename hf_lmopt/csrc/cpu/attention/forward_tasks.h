// Forward attention of a whole call: its blocks of queries, and for few of them parts of the keys, as tasks.
#pragma once

#include "cpu/attention/forward.h"
#include "cpu/attention/tasks.h"

namespace lmopt {
namespace LMOPT_INSTRUCTION_SET {

// The sizes depend on shapes alone, so that the result is the same to the bit with any number of threads.
constexpr int64_t kWantedTasks = 32;
constexpr int64_t kLeastKeyBlocks = 8;  // of a part

class ForwardTasks {
 public:
  explicit ForwardTasks(const AttentionCall& call)
      : call_(call),
        group_size_(call.num_heads / call.num_key_heads),
        shares_heads_(group_size_ > 1 && group_size_ * call.num_queries <= kAttentionBlock),
        query_blocks_(num_attention_blocks(call.num_queries)),
        key_blocks_(num_attention_blocks(call.num_keys)) {
    num_blocks_ = call.batch_size * (shares_heads_ ? call.num_key_heads : call.num_heads * query_blocks_);
    num_parts_ = (kWantedTasks + num_blocks_ - 1) / num_blocks_;
    const int64_t most = key_blocks_ / kLeastKeyBlocks;
    num_parts_ = num_parts_ > most ? (most > 1 ? most : 1) : num_parts_;
  }

  template <class Products>
  bool run() {
    using Worker = Forward<Products>;
    if (num_parts_ == 1) {
      return run_tasks<Worker>(call_.num_threads, num_blocks_, call_, [&](Worker& worker, int64_t task) {
        worker.run(block(task), 0, key_blocks_);
        worker.finish(worker.rows());
      });
    }
    const int64_t part_floats = (2 + padded_head_rows(call_.head_size)) * kAttentionBlock;
    parts_place_ = workspace_.plan(num_blocks_ * num_parts_ * part_floats);
    if (!workspace_.allocate()) return false;
    return run_parts<Worker>(part_floats);
  }

 private:
  template <class Worker>
  bool run_parts(int64_t part_floats) {
    const auto part = [&](int64_t index) {
      float* rows = workspace_.at(parts_place_) + index * part_floats;
      return RunningRows{rows, rows + kAttentionBlock, rows + 2 * kAttentionBlock};
    };
    const int64_t num_tasks = num_blocks_ * num_parts_;
    const bool is_done = run_tasks<Worker>(call_.num_threads, num_tasks, call_, [&](Worker& worker, int64_t task) {
      const int64_t index = task % num_parts_;
      worker.run(block(task / num_parts_), index * key_blocks_ / num_parts_, (index + 1) * key_blocks_ / num_parts_);
      copy(worker.rows(), part(task));
    });
    if (!is_done) return false;
    return run_tasks<Worker>(call_.num_threads, num_blocks_, call_, [&](Worker& worker, int64_t task) {
      const RunningRows whole = part(task * num_parts_);
      for (int64_t index = 1; index < num_parts_; ++index) add(part(task * num_parts_ + index), whole);
      worker.set_block(block(task));
      worker.finish(whole);
    });
  }

  QueryBlock block(int64_t task) const {
    if (shares_heads_) {
      const int64_t key_head = task % call_.num_key_heads;
      return {task / call_.num_key_heads, key_head * group_size_, 0, static_cast<int>(call_.num_queries),
              static_cast<int>(group_size_)};
    }
    // The last ones of a head first: causal ones see the most keys.
    const int64_t first = (query_blocks_ - 1 - task % query_blocks_) * kAttentionBlock, head = task / query_blocks_;
    const int64_t left = call_.num_queries - first;
    return {head / call_.num_heads, head % call_.num_heads, first,
            static_cast<int>(left < kAttentionBlock ? left : kAttentionBlock), 1};
  }

  void copy(const RunningRows& from, const RunningRows& to) const {
    std::memcpy(to.row_max, from.row_max, kAttentionBlock * sizeof(float));
    std::memcpy(to.row_sum, from.row_sum, kAttentionBlock * sizeof(float));
    std::memcpy(to.output, from.output, call_.head_size * kAttentionBlock * sizeof(float));
  }

  void add(const RunningRows& part, const RunningRows& whole) const {
    const float scale = exponent_scale(call_);
    for (int row = 0; row < kAttentionBlock; row += kLanes) {
      const Vector first = load(whole.row_max + row), second = load(part.row_max + row);
      const Vector row_max = maximum(maximum(first, second), broadcast(-1e30f));
      const Vector factor = exp2((first - row_max) * scale), factor2 = exp2((second - row_max) * scale);
      store(whole.row_max + row, maximum(first, second));
      store(whole.row_sum + row, load(whole.row_sum + row) * factor + load(part.row_sum + row) * factor2);
      for (int64_t d = 0; d < call_.head_size; ++d) {
        float* output = whole.output + d * kAttentionBlock + row;
        store(output, load(output) * factor + load(part.output + d * kAttentionBlock + row) * factor2);
      }
    }
  }

  const AttentionCall& call_;
  const int64_t group_size_;
  const bool shares_heads_;
  const int64_t query_blocks_, key_blocks_;
  int64_t num_blocks_, num_parts_;
  int64_t parts_place_ = 0;
  Workspace workspace_;
};

}  // namespace LMOPT_INSTRUCTION_SET
}  // namespace lmopt
