// What the backward pass needs of the queries of one head: query and output gradient in both arrangements, block by
// block, and what belongs to each row.
#pragma once

#include "cpu/attention/exponent.h"
#include "cpu/attention/query_block.h"
#include "cpu/attention/rows.h"
#include "cpu/attention/workspace.h"

namespace lmopt {
namespace LMOPT_INSTRUCTION_SET {

// Of 64 queries, in words.
struct QueryRows {
  const float* query_lanes;     // [words][64 queries]
  const float* gradient_lanes;  // the output's gradient, the same way
  const float* query_rows;      // [64 queries, in pairs for bfloat16][head size, rounded up to 16]
  const float* gradient_rows;
  // [64], in units of the scores, and what rounding left of it; 1e30 where nothing is seen or no row is, which makes
  // weights 0.
  const float* logsumexp;
  const float* logsumexp_rest;
  const float* delta;  // [64]
};

template <class Products>
class HeadQueries {
 public:
  HeadQueries(const AttentionCall& call, const AttentionTensor& output_gradient, const float* delta)
      : call_(call), output_gradient_(output_gradient), delta_(delta) {}

  void plan(Workspace& workspace, int64_t num_blocks) {
    place_ = workspace.plan(num_blocks * block_floats());
    staging_place_ = workspace.plan(lanes_floats());
  }

  void take(const Workspace& workspace) {
    memory_ = workspace.at(place_);
    staging_ = workspace.at(staging_place_);
  }

  // As number `index` of those that are kept.
  void load(const QueryBlock& block, int64_t index) {
    float* target = memory_ + index * block_floats();
    const uint8_t* sees = call_.visibility->queries_see(block.batch, block.first_head);
    const auto query = [&](int row) -> const char* {
      if (row >= block.num_queries || (sees != nullptr && !sees[block.first_query + row])) return nullptr;
      return row_address(call_.query, call_.type, block.batch, block.first_head, block.first_query + row);
    };
    const auto gradient = [&](int row) -> const char* {
      if (row >= block.num_queries) return nullptr;
      return row_address(output_gradient_, call_.type, block.batch, block.first_head, block.first_query + row);
    };
    // All lanes, as products over queries read them.
    load_transposed<Products>(call_.type, call_.head_size, kAttentionBlock, query, staging_, target);
    load_transposed<Products>(
        call_.type, call_.head_size, kAttentionBlock, gradient, staging_, target + lanes_floats());
    load_rows(query, target + 2 * lanes_floats());
    load_rows(gradient, target + 2 * lanes_floats() + rows_floats());
    load_row_terms(block, target + 2 * (lanes_floats() + rows_floats()));
  }

  QueryRows block(int64_t index) const {
    const float* source = memory_ + index * block_floats();
    const float* rows = source + 2 * lanes_floats();
    const float* terms = rows + 2 * rows_floats();
    return {source, source + lanes_floats(), rows, rows + rows_floats(), terms, terms + kAttentionBlock,
            terms + 2 * kAttentionBlock};
  }

 private:
  int64_t padded_head() const { return round_up(call_.head_size, kPanel); }
  int64_t lanes_floats() const {
    return round_up(words_per_row<Products>(call_.head_size), kPanel) * kAttentionBlock;
  }
  int64_t rows_floats() const { return kAttentionBlock / Products::kPerWord * padded_head(); }
  int64_t block_floats() const { return 2 * (lanes_floats() + rows_floats()) + 3 * kAttentionBlock; }

  template <class Address>
  void load_rows(const Address& address, float* target) const {
    for (int row = 0; row < kAttentionBlock; row += Products::kPerWord, target += padded_head()) {
      if constexpr (Products::kIsBfloat16) {
        std::memset(target, 0, padded_head() * sizeof(float));
        interleave_rows(address(row), address(row + 1), call_.head_size, target);
      } else if (const char* source = address(row)) {
        load_words<Products>(call_.type, source, call_.head_size, padded_head(), target);
      } else {
        std::memset(target, 0, padded_head() * sizeof(float));
      }
    }
  }

  void load_row_terms(const QueryBlock& block, float* target) const {
    const int64_t first =
        (block.batch * call_.num_heads + block.first_head) * call_.num_queries + block.first_query;
    const double unit = 1.0 / score_scale(call_);
    for (int row = 0; row < kAttentionBlock; ++row) {
      const bool exists = row < block.num_queries;
      const float logsumexp = exists ? call_.logsumexp[first + row] : -kInfinity;
      const double exact = logsumexp == -kInfinity ? 1e30 : logsumexp * unit;
      target[row] = static_cast<float>(exact);
      target[kAttentionBlock + row] = static_cast<float>(exact - target[row]);
      target[2 * kAttentionBlock + row] = exists ? delta_[first + row] : 0;
    }
  }

  const AttentionCall& call_;
  const AttentionTensor& output_gradient_;
  const float* delta_;
  int64_t place_ = 0, staging_place_ = 0;
  float *memory_ = nullptr, *staging_ = nullptr;
};

}  // namespace LMOPT_INSTRUCTION_SET
}  // namespace lmopt
