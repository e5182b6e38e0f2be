// Which query sees which key, by a row or by a tile; see attention/visibility.h.
#pragma once

#include "cuda/attention/call.h"
#include "cuda/attention/tile.cuh"

namespace lmopt {
namespace cuda {

// The keys that one query sees.
struct SeenKeys {
  int first, end;
  const uint64_t* words;  // of the query's block, one a key; null without a map
  int bit;

  LMOPT_DEVICE bool has(int key) const {
    return first <= key && key < end && (words == nullptr || ((words[key] >> bit) & 1) != 0);
  }
  LMOPT_DEVICE bool is_empty() const { return first >= end; }
};

LMOPT_DEVICE const uint64_t* words_of_block(const Visibility& seen, int64_t batch, int64_t head, int query_block) {
  const int64_t num_query_blocks = num_attention_blocks(seen.num_queries);
  const int64_t row_size = num_attention_blocks(seen.num_keys) * kAttentionBlock;
  return seen.map.words + (seen.map.index_of_mask(batch, head) * num_query_blocks + query_block) * row_size;
}

LMOPT_DEVICE SeenKeys keys_seen_by(const Visibility& seen, int64_t batch, int64_t head, int query) {
  SeenKeys keys{0, static_cast<int>(seen.num_keys), nullptr, query % kAttentionBlock};
  if (seen.first_key != nullptr) {
    keys.first = seen.first_key[query];
    keys.end = seen.end_key[query];
  }
  if (seen.map.words != nullptr) keys.words = words_of_block(seen, batch, head, query / kAttentionBlock);
  const uint8_t* does_see = seen.queries_see(batch, head);
  if (does_see != nullptr && does_see[query] == 0) keys.end = 0;
  return keys;
}

// Not seen rows of key and value may hold NaN.
LMOPT_DEVICE bool is_seen(const uint8_t* keys_seen, int key, int num_keys) {
  return key < num_keys && (keys_seen == nullptr || keys_seen[key] != 0);
}

// For TileCopy: where rows of key or value lie, from `first_key` on; of those that are seen.
template <class T>
LMOPT_DEVICE auto offsets_of_keys(const HeadRows<T>& rows, const uint8_t* keys_seen, int first_key, int num_keys) {
  return [=](int row) -> int64_t {
    const int key = first_key + row;
    return is_seen(keys_seen, key, num_keys) ? rows.offset_of(key) : -1;
  };
}

// The same of query or output gradient; of those that see anything.
template <class T>
LMOPT_DEVICE auto offsets_of_queries(
    const HeadRows<T>& rows, const DeviceCall& call, int batch, int head, int first_query) {
  return [=, &call](int row) -> int64_t {
    const int query = first_query + row;
    const bool counts = query < call.num_queries && !keys_seen_by(call.visibility, batch, head, query).is_empty();
    return counts ? rows.offset_of(query) : -1;
  };
}

LMOPT_DEVICE BlockState state_by_interval(const BlockInterval& interval, int first_key, int end_key) {
  if (end_key <= interval.first_of_any || interval.end_of_any <= first_key) return BlockState::empty;
  const bool is_full = interval.first_of_all <= first_key && end_key <= interval.end_of_all;
  return is_full ? BlockState::full : BlockState::mixed;
}

// Of the queries and keys from the first to before the end; each end may lie beyond the last one.
LMOPT_DEVICE BlockState state_of_tile(
    const DeviceCall& call, int64_t batch, int64_t head, int first_query, int end_query, int first_key, int end_key) {
  const Visibility& seen = call.visibility;
  const int num_key_blocks = static_cast<int>(num_attention_blocks(call.num_keys));
  const int64_t num_query_blocks = num_attention_blocks(call.num_queries);
  bool is_any = false, is_all = end_key <= call.num_keys;
  end_query = min(end_query, call.num_queries);
  end_key = min(end_key, call.num_keys);
  if (seen.map.states == nullptr && call.block_intervals == nullptr) {
    return is_all ? BlockState::full : BlockState::mixed;
  }
  for (int row = first_query / kAttentionBlock; row * kAttentionBlock < end_query; ++row) {
    for (int column = first_key / kAttentionBlock; column * kAttentionBlock < end_key; ++column) {
      BlockState state;
      if (seen.map.states != nullptr) {
        const int64_t line = seen.map.index_of_mask(batch, head) * num_query_blocks + row;
        state = seen.map.states[line * num_key_blocks + column];
      } else {
        state = state_by_interval(call.block_intervals[row], first_key, end_key);
      }
      is_any = is_any || state != BlockState::empty;
      is_all = is_all && state == BlockState::full;
    }
  }
  return is_all ? BlockState::full : is_any ? BlockState::mixed : BlockState::empty;
}

}  // namespace cuda
}  // namespace lmopt
