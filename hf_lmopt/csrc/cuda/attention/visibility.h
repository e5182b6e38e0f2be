// Which query sees which key, made on the device; nothing waits for it there. See attention/visibility.h.
#pragma once

#include "cuda/attention/call.h"

namespace lmopt {
namespace cuda {

// In pointers to memory of the device. Boundaries cannot be checked here: what lies outside the lengths is cut off.
struct VisibilityRules {
  int32_t num_queries, num_keys;
  bool is_causal;
  int64_t window_left, window_right;  // number of keys, -1 for no limit
  const int32_t* query_boundaries;    // [num_documents + 1] each, or null
  const int32_t* key_boundaries;
  int32_t num_documents;
};

// A boolean mask [Bm, Hm, Lq, Lk], strides in bytes; 1 where it is shared.
struct DeviceMask {
  const uint8_t* data;
  int32_t batch_size, num_heads;
  int64_t batch_stride, head_stride, row_stride;
};

// Results to be filled; a null one is not wanted.
struct IntervalResults {
  int32_t* first_key;  // [Lq]
  int32_t* end_key;    // [Lq]
  BlockInterval* blocks;  // [query blocks]
  uint8_t* is_key_seen;   // [Lk]
};

struct MapResults {
  BlockState* states;       // [Bm, Hm, query blocks, key blocks]
  uint64_t* words;          // [Bm, Hm, query blocks, key blocks, 64], of all blocks
  uint8_t* is_key_seen;     // [Bm, seen_key_heads, Lk]
  uint8_t* does_query_see;  // [Bm, Hm, Lq]
  int32_t seen_key_heads;   // 1 or Hkv
};

// `stream` is a cudaStream_t; each returns a cudaError_t, 0 for success.
int build_intervals(const VisibilityRules& rules, const IntervalResults& results, void* stream);

// The mask, less what the rules hide.
int build_map(const DeviceMask& mask, const VisibilityRules& rules, const MapResults& results, void* stream);

}  // namespace cuda
}  // namespace lmopt
