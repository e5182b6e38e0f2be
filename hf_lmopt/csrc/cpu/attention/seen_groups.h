// Over the parts of a block of keys that are seen.
#pragma once

#include "cpu/attention/query_block.h"

namespace lmopt {
namespace LMOPT_INSTRUCTION_SET {

constexpr int64_t kBlockFloats = kAttentionBlock * kAttentionBlock;

// Calls body(first key, number of keys, first panel, end panel) for the parts of a block of keys that are seen.
template <class Body>
LMOPT_INLINE void for_each_seen_group(const SeenKeys& seen, int num_keys, const Body& body) {
  if (seen.state == BlockState::full) return body(0, num_keys, seen.first_panel[0], seen.end_panel[0]);
  for (int group = 0; group < kGroups && group * kGroup < num_keys; ++group) {
    const int first = group * kGroup, count = num_keys - first < kGroup ? num_keys - first : kGroup;
    if (seen.first_panel[group] < seen.end_panel[group]) {
      body(first, count, seen.first_panel[group], seen.end_panel[group]);
    }
  }
}

// Calls body(first panel, end panel, first key, end key) for panels that see the same groups of keys, taken together.
template <class Body>
LMOPT_INLINE void for_each_seen_panels(const SeenKeys& seen, int num_keys, int num_panels, const Body& body) {
  if (seen.state == BlockState::full) return body(0, num_panels, 0, num_keys);
  int first_key[kPanels], end_key[kPanels];
  for (int panel = 0; panel < num_panels; ++panel) {
    first_key[panel] = num_keys, end_key[panel] = 0;
    for (int group = 0; group * kGroup < num_keys; ++group) {
      if (panel < seen.first_panel[group] || panel >= seen.end_panel[group]) continue;
      if (first_key[panel] == num_keys) first_key[panel] = group * kGroup;
      end_key[panel] = (group + 1) * kGroup < num_keys ? (group + 1) * kGroup : num_keys;
    }
  }
  for (int first = 0, end; first < num_panels; first = end) {
    for (end = first + 1; end < num_panels; ++end) {
      if (first_key[end] != first_key[first] || end_key[end] != end_key[first]) break;
    }
    if (first_key[first] < end_key[first]) body(first, end, first_key[first], end_key[first]);
  }
}

}  // namespace LMOPT_INSTRUCTION_SET
}  // namespace lmopt
