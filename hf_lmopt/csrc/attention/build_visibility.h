// Makes the Visibility of a call, and the map of blocks of a mask.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "attention/visibility.h"

namespace lmopt {

// A boolean mask [Bm, Hm, Lq, Lk] of bytes 0 or 1, whose last dimension is dense; strides in bytes.
struct AttentionMask {
  const uint8_t* data;            // null if there is none
  int64_t batch_size, num_heads;  // 1 where it is shared, also if there is none
  int64_t batch_stride, head_stride, row_stride;
};

struct VisibilityOptions {
  int64_t num_queries, num_keys, num_heads, num_key_heads;
  bool is_causal;
  int64_t window_left, window_right;  // number of keys, -1 for no limit
  // [num_documents + 1] each: from 0 up to the lengths, never falling; null if nothing is packed.
  const int32_t* query_boundaries;
  const int32_t* key_boundaries;
  int64_t num_documents;
  AttentionMask mask;
};

// Owns what a Visibility points to. Throws std::bad_alloc.
class VisibilityStorage {
 public:
  explicit VisibilityStorage(const VisibilityOptions& options);
  VisibilityStorage(const VisibilityStorage&) = delete;
  VisibilityStorage& operator=(const VisibilityStorage&) = delete;

  const Visibility& view() const { return view_; }

 private:
  void build_intervals(const VisibilityOptions& options);
  void mark_seen_by_intervals();
  void map_mask(const VisibilityOptions& options);
  void mark_seen_keys(const VisibilityOptions& options, const std::vector<uint64_t>& seen_keys);

  Visibility view_{};
  std::vector<int32_t> first_key_, end_key_;
  std::vector<BlockState> states_;
  std::unique_ptr<uint64_t[]> words_;  // not filled before use: most blocks of most masks need none
  std::vector<uint8_t> is_key_seen_, does_query_see_;
};

// Fills states [Bm, Hm, query blocks, key blocks] and the words of all blocks, [..., 64], of full and empty ones too.
void map_blocks(
    const AttentionMask& mask, int64_t num_queries, int64_t num_keys, BlockState* states, uint64_t* words);

}  // namespace lmopt
