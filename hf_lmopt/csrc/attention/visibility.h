// Which query sees which key, in blocks of 64 by 64: made once per call, the same for all instruction sets.
//
// Causality, windows and packed documents leave each query one interval of keys. A mask becomes a map of blocks, empty,
// mixed or full, and a word per key for the mixed ones. A query sees a key where both allow it.
#pragma once

#include <cstdint>

namespace lmopt {

// Kernels of all instruction sets include this file: what were not inlined, the linker would share among them.
#if defined(__CUDACC__)
#define LMOPT_ALWAYS_INLINE __host__ __device__ __attribute__((always_inline))
#else
#define LMOPT_ALWAYS_INLINE __attribute__((always_inline))
#endif

constexpr int kAttentionBlock = 64;  // queries or keys

enum class BlockState : uint8_t { empty, mixed, full };

LMOPT_ALWAYS_INLINE inline int64_t num_attention_blocks(int64_t length) {
  return (length + kAttentionBlock - 1) / kAttentionBlock;
}

// Bit q of a word is query q of the block; queries and keys beyond the end are seen by none and see none.
struct BlockMap {
  const BlockState* states;  // [Bm, Hm, query blocks, key blocks], or null if there is no mask
  const uint64_t* words;     // [Bm, Hm, query blocks, key blocks, 64 keys]; undefined where a block is not mixed
  int64_t batch_size, num_heads;  // 1 where the mask is shared

  LMOPT_ALWAYS_INLINE int64_t index_of_mask(int64_t batch, int64_t head) const {
    return (batch_size == 1 ? 0 : batch) * num_heads + (num_heads == 1 ? 0 : head);
  }
};

struct Visibility {
  int64_t num_queries, num_keys;
  // [Lq]: a query sees first_key <= key < end_key by causality, window and document; null if all see all.
  const int32_t* first_key;
  const int32_t* end_key;
  BlockMap map;
  // What nobody sees may hold NaN. Bytes, 0 where the key is seen by no query, and where the query sees no key; null if
  // there is no such one.
  const uint8_t* is_key_seen;   // [Bm, Hm or Hkv, Lk]
  const uint8_t* does_query_see;  // [Bm, Hm, Lq]
  int64_t seen_key_heads;       // 1 or Hkv

  // 64, but for the last block.
  LMOPT_ALWAYS_INLINE int keys_in_block(int64_t key_block) const {
    const int64_t left = num_keys - key_block * kAttentionBlock;
    return static_cast<int>(left < kAttentionBlock ? left : kAttentionBlock);
  }

  LMOPT_ALWAYS_INLINE const uint8_t* keys_seen(int64_t batch, int64_t key_head) const {
    if (is_key_seen == nullptr) return nullptr;
    const int64_t entry = (map.batch_size == 1 ? 0 : batch) * seen_key_heads + (seen_key_heads == 1 ? 0 : key_head);
    return is_key_seen + entry * num_keys;
  }

  LMOPT_ALWAYS_INLINE const uint8_t* queries_see(int64_t batch, int64_t head) const {
    if (does_query_see == nullptr) return nullptr;
    return does_query_see + map.index_of_mask(batch, head) * num_queries;
  }
};

}  // namespace lmopt
