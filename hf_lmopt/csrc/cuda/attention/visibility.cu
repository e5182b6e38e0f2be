// Intervals, one thread a query or a key; and the map of a mask, one block of threads for each 64 queries by 64 keys.
#include <algorithm>

#include "cuda/attention/primitives.cuh"
#include "cuda/attention/visibility.h"

namespace lmopt {
namespace cuda {
namespace {

struct Interval {
  int first, end;
};

struct Document {
  int first_query, end_query, first_key, end_key;
};

LMOPT_DEVICE int64_t clamp(int64_t number, int64_t low, int64_t high) {
  return number < low ? low : number > high ? high : number;
}

// The last document that begins at or before `position`; of empty ones at the same place, the last.
LMOPT_DEVICE int find_document(const int32_t* boundaries, int num_documents, int position) {
  int low = 0, high = num_documents;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (boundaries[middle] <= position) low = middle;
    else high = middle;
  }
  return low;
}

LMOPT_DEVICE Document load_document(const VisibilityRules& rules, int index) {
  if (rules.query_boundaries == nullptr) return {0, rules.num_queries, 0, rules.num_keys};
  const auto query = [&](int n) { return static_cast<int>(clamp(rules.query_boundaries[n], 0, rules.num_queries)); };
  const auto key = [&](int n) { return static_cast<int>(clamp(rules.key_boundaries[n], 0, rules.num_keys)); };
  return {query(index), query(index + 1), key(index), key(index + 1)};
}

LMOPT_DEVICE Interval keys_seen_by_rules(const VisibilityRules& rules, int query) {
  if (query >= rules.num_queries) return {0, 0};
  const int index =
      rules.query_boundaries == nullptr ? 0 : find_document(rules.query_boundaries, rules.num_documents, query);
  const Document document = load_document(rules, index);
  const int64_t own_key = static_cast<int64_t>(query) - document.end_query + document.end_key;
  int64_t first = document.first_key, end = document.end_key;
  if (rules.is_causal) end = min(end, own_key + 1);
  if (rules.window_right >= 0) end = min(end, own_key + min(rules.window_right, int64_t{1} << 31) + 1);
  if (rules.window_left >= 0) first = max(first, own_key - min(rules.window_left, int64_t{1} << 31));
  first = clamp(first, 0, rules.num_keys);
  return {static_cast<int>(first), static_cast<int>(max(first, end))};
}

// The intervals of a document's queries follow each other without a gap, up to its last key.
LMOPT_DEVICE bool is_seen_by_rules(const VisibilityRules& rules, int key) {
  const int index =
      rules.key_boundaries == nullptr ? 0 : find_document(rules.key_boundaries, rules.num_documents, key);
  const Document document = load_document(rules, index);
  const int64_t num_queries = document.end_query - document.first_query;
  if (num_queries <= 0 || key < document.first_key || key >= document.end_key) return false;
  return rules.window_left < 0 || key >= document.end_key - num_queries - min(rules.window_left, int64_t{1} << 31);
}

constexpr int kThreads = 256;

template <class Reduce>
LMOPT_DEVICE int reduce_over_warp(int value, const Reduce& reduce) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value = reduce(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// A warp for each block of 64 queries; queries that see nothing count in what all see alone.
__global__ void __launch_bounds__(kThreads) intervals_kernel(
    const VisibilityRules rules, const IntervalResults results) {
  const int64_t block = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) / kWarpSize;
  if (block >= num_attention_blocks(rules.num_queries)) return;
  BlockInterval found{rules.num_keys, 0, 0, rules.num_keys};
  for (int i = threadIdx.x % kWarpSize; i < kAttentionBlock; i += kWarpSize) {
    const int64_t query = block * kAttentionBlock + i;
    if (query >= rules.num_queries) break;
    const Interval keys = keys_seen_by_rules(rules, static_cast<int>(query));
    results.first_key[query] = keys.first;
    results.end_key[query] = keys.end;
    found.first_of_all = max(found.first_of_all, keys.first);
    found.end_of_all = min(found.end_of_all, keys.end);
    if (keys.first >= keys.end) continue;
    found.first_of_any = min(found.first_of_any, keys.first);
    found.end_of_any = max(found.end_of_any, keys.end);
  }
  const auto smaller = [](int a, int b) { return min(a, b); };
  const auto larger = [](int a, int b) { return max(a, b); };
  found.first_of_any = reduce_over_warp(found.first_of_any, smaller);
  found.end_of_any = reduce_over_warp(found.end_of_any, larger);
  found.first_of_all = reduce_over_warp(found.first_of_all, larger);
  found.end_of_all = reduce_over_warp(found.end_of_all, smaller);
  if (threadIdx.x % kWarpSize == 0) results.blocks[block] = found;
}

__global__ void __launch_bounds__(kThreads) seen_keys_kernel(const VisibilityRules rules, uint8_t* is_key_seen) {
  const int64_t key = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (key < rules.num_keys) is_key_seen[key] = is_seen_by_rules(rules, static_cast<int>(key));
}

// Each thread reads the bytes of one key for 16 of the queries.
__global__ void __launch_bounds__(kThreads) map_kernel(
    const DeviceMask mask, const VisibilityRules rules, const MapResults results) {
  constexpr int kQueriesPerThread = kAttentionBlock * kAttentionBlock / kThreads;
  __shared__ Interval intervals[kAttentionBlock];
  __shared__ uint64_t parts[kAttentionBlock / kQueriesPerThread][kAttentionBlock];
  const int64_t num_key_blocks = num_attention_blocks(rules.num_keys);
  const int64_t num_query_blocks = num_attention_blocks(rules.num_queries);
  const int64_t index = blockIdx.x, key_block = index % num_key_blocks;
  const int64_t query_block = index / num_key_blocks % num_query_blocks;
  const int64_t entry = index / num_key_blocks / num_query_blocks;
  const int first_query = static_cast<int>(query_block) * kAttentionBlock;
  const int first_key = static_cast<int>(key_block) * kAttentionBlock;
  if (threadIdx.x < kAttentionBlock) intervals[threadIdx.x] = keys_seen_by_rules(rules, first_query + threadIdx.x);
  __syncthreads();

  const int column = threadIdx.x % kAttentionBlock, part = threadIdx.x / kAttentionBlock;
  const int key = first_key + column;
  const uint8_t* bytes = mask.data + entry / mask.num_heads * mask.batch_stride +
      entry % mask.num_heads * mask.head_stride + key;
  uint64_t bits = 0;
  bool has_all = true;
  for (int i = 0; i < kQueriesPerThread; ++i) {
    const int row = part * kQueriesPerThread + i;
    if (first_query + row >= rules.num_queries || key >= rules.num_keys) break;
    const Interval& keys = intervals[row];
    const bool is_seen = keys.first <= key && key < keys.end && bytes[(first_query + row) * mask.row_stride] != 0;
    bits |= static_cast<uint64_t>(is_seen) << row;
    has_all = has_all && is_seen;
  }
  parts[part][column] = bits;
  const bool is_full = __syncthreads_and(has_all), is_any = __syncthreads_or(bits != 0);
  uint64_t* words = results.words + index * kAttentionBlock;
  if (part == 0) words[column] = parts[0][column] | parts[1][column] | parts[2][column] | parts[3][column];
  if (threadIdx.x == 0) {
    results.states[index] = is_full ? BlockState::full : is_any ? BlockState::mixed : BlockState::empty;
  }
}

// A thread for each key of each entry; with masks per head, one for all heads that share the key.
__global__ void __launch_bounds__(kThreads) seen_keys_of_map_kernel(
    const DeviceMask mask, const VisibilityRules rules, const MapResults results) {
  const int64_t row_size = num_attention_blocks(rules.num_keys) * kAttentionBlock;
  const int64_t num_query_blocks = num_attention_blocks(rules.num_queries);
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t key = index % rules.num_keys, entry = index / rules.num_keys;
  if (entry >= static_cast<int64_t>(mask.batch_size) * results.seen_key_heads) return;
  const int num_heads = mask.num_heads / results.seen_key_heads;  // that share the key
  const uint64_t* words = results.words + entry * num_heads * num_query_blocks * row_size + key;
  uint64_t any = 0;
  for (int64_t row = 0; row < num_heads * num_query_blocks; ++row) any |= words[row * row_size];
  results.is_key_seen[index] = any != 0;
}

// A warp for each block of 64 queries of each entry.
__global__ void __launch_bounds__(kThreads) seeing_queries_kernel(
    const DeviceMask mask, const VisibilityRules rules, const MapResults results) {
  const int64_t row_size = num_attention_blocks(rules.num_keys) * kAttentionBlock;
  const int64_t num_query_blocks = num_attention_blocks(rules.num_queries);
  const int64_t row = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) / kWarpSize;
  const int64_t num_entries = static_cast<int64_t>(mask.batch_size) * mask.num_heads;
  if (row >= num_entries * num_query_blocks) return;
  const int lane = threadIdx.x % kWarpSize;
  const uint64_t* words = results.words + row * row_size;
  uint64_t any = 0;
  for (int64_t key = lane; key < row_size; key += kWarpSize) any |= words[key];
  const auto both = [](int a, int b) { return a | b; };
  const uint64_t low = static_cast<uint32_t>(reduce_over_warp(static_cast<int>(any), both));
  const uint64_t high = static_cast<uint32_t>(reduce_over_warp(static_cast<int>(any >> 32), both));
  any = high << 32 | low;
  const int64_t entry = row / num_query_blocks;
  for (int i = lane; i < kAttentionBlock; i += kWarpSize) {
    const int64_t query = row % num_query_blocks * kAttentionBlock + i;
    if (query < rules.num_queries) results.does_query_see[entry * rules.num_queries + query] = any >> i & 1;
  }
}

unsigned num_thread_blocks(int64_t num_threads) {
  return static_cast<unsigned>((num_threads + kThreads - 1) / kThreads);
}

}  // namespace

int build_intervals(const VisibilityRules& rules, const IntervalResults& results, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const int64_t num_blocks = num_attention_blocks(rules.num_queries);
  intervals_kernel<<<num_thread_blocks(num_blocks * kWarpSize), kThreads, 0, on>>>(rules, results);
  if (results.is_key_seen != nullptr) {
    seen_keys_kernel<<<num_thread_blocks(rules.num_keys), kThreads, 0, on>>>(rules, results.is_key_seen);
  }
  return cudaGetLastError();
}

int build_map(const DeviceMask& mask, const VisibilityRules& rules, const MapResults& results, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const int64_t num_entries = static_cast<int64_t>(mask.batch_size) * mask.num_heads;
  const int64_t num_rows = num_entries * num_attention_blocks(rules.num_queries);
  map_kernel<<<static_cast<unsigned>(num_rows * num_attention_blocks(rules.num_keys)), kThreads, 0, on>>>(
      mask, rules, results);
  if (results.is_key_seen != nullptr) {
    const int64_t num_seen = static_cast<int64_t>(mask.batch_size) * results.seen_key_heads * rules.num_keys;
    seen_keys_of_map_kernel<<<num_thread_blocks(num_seen), kThreads, 0, on>>>(mask, rules, results);
  }
  if (results.does_query_see != nullptr) {
    seeing_queries_kernel<<<num_thread_blocks(num_rows * kWarpSize), kThreads, 0, on>>>(mask, rules, results);
  }
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace lmopt
