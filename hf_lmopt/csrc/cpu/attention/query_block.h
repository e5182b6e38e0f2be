// Up to 64 queries that are worked on at once, and which of the keys of a block each of them sees.
#pragma once

#include "attention/attention.h"
#include "attention/bit_matrix.h"
#include "cpu/attention/vector.h"

namespace lmopt {
namespace LMOPT_INSTRUCTION_SET {

constexpr int kGroup = 16;  // neighbouring keys for which panels that see none of them are left out
constexpr int kGroups = kAttentionBlock / kGroup;

// Queries of one head; or, where they are few, all queries of all heads that share a key head, head by head.
struct QueryBlock {
  int64_t batch;
  int64_t first_head;
  int64_t first_query;
  int num_queries;  // of each head
  int num_heads;

  int num_rows() const { return num_queries * num_heads; }
  int num_panels() const { return (num_rows() + kPanel - 1) / kPanel; }
  int64_t head_of(int row) const { return first_head + row / num_queries; }
  int64_t query_of(int row) const { return first_query + row % num_queries; }
};

// Which keys of a block of 64 the queries see.
struct SeenKeys {
  BlockState state;
  uint64_t words[kAttentionBlock];  // bit r of word k: row r sees key k; if mixed
  // Of each 16 keys, the panels in which any is seen; equal if none.
  int first_panel[kGroups], end_panel[kGroups];
};

// Answers that for one block of queries after the other.
class KeyFinder {
 public:
  explicit KeyFinder(const Visibility& visibility) : visibility_(visibility) {}

  void set_queries(const QueryBlock& block) {
    block_ = block;
    first_key_ = 0, end_key_ = visibility_.num_keys;
    if (visibility_.first_key == nullptr) return;
    first_key_ = first_end_key_ = visibility_.num_keys;
    end_key_ = last_first_ = 0;
    for (int i = 0; i < block.num_queries; ++i) {
      const int64_t first = visibility_.first_key[block.first_query + i];
      const int64_t end = visibility_.end_key[block.first_query + i];
      if (first < end) {
        first_key_ = first < first_key_ ? first : first_key_;
        end_key_ = end > end_key_ ? end : end_key_;
      }
      last_first_ = first > last_first_ ? first : last_first_;
      first_end_key_ = end < first_end_key_ ? end : first_end_key_;
    }
  }

  // The key blocks in which anything can be seen.
  int64_t first_block() const { return first_key_ / kAttentionBlock; }
  int64_t end_block() const { return end_key_ <= first_key_ ? first_block() : num_attention_blocks(end_key_); }

  // Which keys of a block are seen; the words and panels too.
  void find(int64_t key_block, SeenKeys& seen) const {
    const int64_t first = key_block * kAttentionBlock;
    const int64_t end = first + visibility_.keys_in_block(key_block);
    const bool is_full_interval =
        visibility_.first_key == nullptr || (last_first_ <= first && end <= first_end_key_);
    seen.state = state_of_mask(key_block);
    if (seen.state == BlockState::empty) return;
    if (seen.state == BlockState::full && is_full_interval) {
      for (int group = 0; group < kGroups; ++group) {
        seen.first_panel[group] = 0;
        seen.end_panel[group] = block_.num_panels();
      }
      return;
    }
    if (seen.state == BlockState::full) {
      words_of_intervals(first, seen.words);
    } else {
      words_of_mask(key_block, seen.words);
      if (!is_full_interval) {
        uint64_t words[kAttentionBlock];
        words_of_intervals(first, words);
        for (int k = 0; k < kAttentionBlock; ++k) seen.words[k] &= words[k];
      }
    }
    seen.state = find_panels(seen);
  }

 private:
  // Of all heads in the block together.
  BlockState state_of_mask(int64_t key_block) const {
    if (visibility_.map.states == nullptr) return BlockState::full;
    const BlockState state = visibility_.map.states[mask_block(block_.first_head, key_block)];
    if (visibility_.map.num_heads == 1) return state;
    for (int h = 1; h < block_.num_heads; ++h) {
      if (visibility_.map.states[mask_block(block_.first_head + h, key_block)] != state) return BlockState::mixed;
    }
    return state;
  }

  int64_t mask_block(int64_t head, int64_t key_block) const {
    const int64_t query_blocks = num_attention_blocks(visibility_.num_queries);
    const int64_t query_block = block_.first_query / kAttentionBlock;
    const int64_t row = visibility_.map.index_of_mask(block_.batch, head) * query_blocks + query_block;
    return row * num_attention_blocks(visibility_.num_keys) + key_block;
  }

  void words_of_mask(int64_t key_block, uint64_t (&words)[kAttentionBlock]) const {
    for (uint64_t& word : words) word = 0;
    const uint64_t all = bits_between(0, block_.num_queries);
    for (int h = 0; h < block_.num_heads; ++h) {
      const int64_t block = mask_block(block_.first_head + h, key_block);
      const BlockState state = visibility_.map.states[block];
      if (state == BlockState::empty) continue;
      const uint64_t* of_head = visibility_.map.words + block * kAttentionBlock;
      const int shift = h * block_.num_queries;
      for (int k = 0; k < kAttentionBlock; ++k) {
        words[k] |= (state == BlockState::full ? all : of_head[k] & all) << shift;
      }
    }
  }

  void words_of_intervals(int64_t first_key, uint64_t (&words)[kAttentionBlock]) const {
    for (int row = 0; row < kAttentionBlock; ++row) {
      words[row] = 0;
      if (row >= block_.num_rows()) continue;
      const int64_t query = block_.query_of(row);
      words[row] = bits_between(visibility_.first_key[query] - first_key, visibility_.end_key[query] - first_key);
    }
    transpose_bits(words);
  }

  // Sets the panels of each group; whether there are any.
  static BlockState find_panels(SeenKeys& seen) {
    BlockState state = BlockState::empty;
    for (int group = 0; group < kGroups; ++group) {
      uint64_t any = 0;
      for (int k = 0; k < kGroup; ++k) any |= seen.words[group * kGroup + k];
      seen.first_panel[group] = any == 0 ? 0 : __builtin_ctzll(any) / kPanel;
      seen.end_panel[group] = any == 0 ? 0 : (63 - __builtin_clzll(any)) / kPanel + 1;
      if (any != 0) state = BlockState::mixed;
    }
    return state;
  }

  const Visibility& visibility_;
  QueryBlock block_{};
  int64_t first_key_ = 0, end_key_ = 0;          // of the union of the queries' intervals
  int64_t last_first_ = 0, first_end_key_ = 0;  // of what all of them see
};

}  // namespace LMOPT_INSTRUCTION_SET
}  // namespace lmopt
