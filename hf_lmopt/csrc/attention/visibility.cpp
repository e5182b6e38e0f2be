// Which query sees which key. A mask is read once, a block of 64 by 64 bytes at a time: first as whole words of eight
// bytes, which tells whether it is full or empty, and only if it is neither as bits.
#include "attention/build_visibility.h"

#include <algorithm>
#include <cstring>

#include "attention/bit_matrix.h"
#include "parallel.h"

namespace lmopt {
namespace {

constexpr int64_t kBlocksPerTask = 64;  // at least, or threads cost more than they bring
constexpr uint64_t kAllBits = ~uint64_t{0};
constexpr uint64_t kEightOnes = 0x0101010101010101;

uint64_t load_eight(const uint8_t* bytes) {
  uint64_t word;
  std::memcpy(&word, bytes, sizeof word);
  return word;
}

// Bit i is byte i, of 64 bytes of 0 or 1. The product shifts byte i by 56 - 7 i bits, into bit i of the upper byte.
uint64_t pack_row(const uint8_t* bytes) {
  uint64_t bits = 0;
  for (int i = 0; i < 64; i += 8) bits |= (load_eight(bytes + i) * 0x0102040810204080) >> 56 << i;
  return bits;
}

// A block of a mask, at most 64 by 64.
struct MaskBlock {
  const uint8_t* data;
  int64_t row_stride;
  int num_rows, num_columns;

  uint64_t all_columns() const { return bits_between(0, num_columns); }

  // What whole rows of 64 bytes have in common; mixed as soon as two bytes differ.
  BlockState scan() const {
    uint64_t all = kEightOnes, any = 0;
    for (int r = 0; r < num_rows; ++r) {
      for (int c = 0; c < 64; c += 8) {
        const uint64_t word = load_eight(data + r * row_stride + c);
        all &= word;
        any |= word;
      }
      if (all != kEightOnes && any != 0) return BlockState::mixed;
    }
    return any == 0 ? BlockState::empty : BlockState::full;
  }

  void load(uint64_t rows[64]) const {
    uint8_t padded[64] = {};
    for (int r = 0; r < num_rows; ++r) {
      const uint8_t* bytes = data + r * row_stride;
      if (num_columns < 64) bytes = static_cast<const uint8_t*>(std::memcpy(padded, bytes, num_columns));
      rows[r] = pack_row(bytes);
    }
    std::fill(rows + num_rows, rows + 64, 0);
  }

  // Its state; row r has bit c where a pair is seen, and no bits outside.
  BlockState read(uint64_t rows[64]) const {
    if (row_stride == 0 && num_rows > 1) {
      const BlockState state = MaskBlock{data, 0, 1, num_columns}.read(rows);
      std::fill(rows + 1, rows + num_rows, rows[0]);
      return state;
    }
    BlockState state = num_columns == 64 ? scan() : BlockState::mixed;
    if (state == BlockState::mixed) {
      load(rows);
    } else {
      std::fill(rows, rows + 64, 0);
      if (state == BlockState::full) std::fill(rows, rows + num_rows, kAllBits);
    }
    if (num_columns == 64) return state;
    uint64_t all = all_columns(), any = 0;
    for (int r = 0; r < num_rows; ++r) {
      all &= rows[r];
      any |= rows[r];
    }
    return any == 0 ? BlockState::empty : all == all_columns() ? BlockState::full : BlockState::mixed;
  }
};

// The blocks of one entry (of batch and head) for 64 queries.
struct MaskStrip {
  const AttentionMask& mask;
  int64_t entry, first_query, num_queries, num_keys;

  int num_rows() const { return static_cast<int>(std::min<int64_t>(num_queries - first_query, 64)); }

  MaskBlock block(int64_t key_block) const {
    const uint8_t* data = mask.data + entry / mask.num_heads * mask.batch_stride +
        entry % mask.num_heads * mask.head_stride + first_query * mask.row_stride + key_block * 64;
    const int num_columns = static_cast<int>(std::min<int64_t>(num_keys - key_block * 64, 64));
    return {data, mask.row_stride, num_rows(), num_columns};
  }
};

// Calls body(strip, its number) for all strips of all entries.
template <class Function>
void for_each_strip(const AttentionMask& mask, int64_t num_queries, int64_t num_keys, Function&& body) {
  const int64_t query_blocks = num_attention_blocks(num_queries), key_blocks = num_attention_blocks(num_keys);
  if (key_blocks == 0) return;
  const int64_t num_strips = mask.batch_size * mask.num_heads * query_blocks;
  parallel_for(0, num_strips, (kBlocksPerTask + key_blocks - 1) / key_blocks, [&](int64_t first, int64_t end) {
    for (int64_t strip = first; strip < end; ++strip) {
      body(MaskStrip{mask, strip / query_blocks, strip % query_blocks * 64, num_queries, num_keys}, strip);
    }
  });
}

// The intervals of the queries of one strip.
struct StripIntervals {
  int32_t first[64], end[64];
  int64_t union_first, union_end;  // that some query has
  int64_t common_first, common_end;  // that all queries have

  StripIntervals(const Visibility& visibility, const MaskStrip& strip) {
    union_first = strip.num_keys, union_end = 0, common_first = 0, common_end = strip.num_keys;
    for (int r = 0; r < strip.num_rows(); ++r) {
      const int64_t query = strip.first_query + r;
      first[r] = visibility.first_key == nullptr ? 0 : visibility.first_key[query];
      end[r] = visibility.end_key == nullptr ? static_cast<int32_t>(strip.num_keys) : visibility.end_key[query];
      common_first = std::max<int64_t>(common_first, first[r]);
      common_end = std::min<int64_t>(common_end, end[r]);
      if (first[r] == end[r]) continue;
      union_first = std::min<int64_t>(union_first, first[r]);
      union_end = std::max<int64_t>(union_end, end[r]);
    }
  }

  bool meets(int64_t first_key) const { return union_first < first_key + 64 && first_key < union_end; }

  // Takes out of the rows what the intervals forbid.
  void apply(uint64_t rows[64], int num_rows, int64_t first_key) const {
    if (common_first <= first_key && first_key + 64 <= common_end) return;
    for (int r = 0; r < num_rows; ++r) rows[r] &= bits_between(first[r] - first_key, end[r] - first_key);
  }
};

}  // namespace

VisibilityStorage::VisibilityStorage(const VisibilityOptions& options) {
  view_.num_queries = options.num_queries;
  view_.num_keys = options.num_keys;
  view_.map.batch_size = options.mask.batch_size;
  view_.map.num_heads = options.mask.num_heads;
  view_.seen_key_heads = 1;
  build_intervals(options);
  if (options.mask.data != nullptr) {
    map_mask(options);
  } else if (view_.first_key != nullptr) {
    mark_seen_by_intervals();
  }
  const auto points_to = [](const std::vector<uint8_t>& bytes) {
    return std::find(bytes.begin(), bytes.end(), 0) == bytes.end() ? nullptr : bytes.data();
  };
  view_.is_key_seen = points_to(is_key_seen_);
  view_.does_query_see = points_to(does_query_see_);
}

void VisibilityStorage::build_intervals(const VisibilityOptions& options) {
  if (!options.is_causal && options.window_left < 0 && options.window_right < 0 && options.num_documents <= 1) return;
  const int32_t whole_queries[] = {0, static_cast<int32_t>(options.num_queries)};
  const int32_t whole_keys[] = {0, static_cast<int32_t>(options.num_keys)};
  const bool is_packed = options.num_documents > 1;
  const int32_t* query_ends = (is_packed ? options.query_boundaries : whole_queries) + 1;
  const int32_t* key_ends = (is_packed ? options.key_boundaries : whole_keys) + 1;
  const int64_t unlimited = options.num_queries + options.num_keys;
  const auto limit = [&](int64_t side) { return side < 0 ? unlimited : std::min(side, unlimited); };
  const int64_t left = limit(options.window_left);
  const int64_t right = options.is_causal ? 0 : limit(options.window_right);

  first_key_.resize(options.num_queries);
  end_key_.resize(options.num_queries);
  int64_t query = 0, first_of_document = 0;
  bool all_see_all = true;
  for (int64_t document = 0; document < (is_packed ? options.num_documents : 1); ++document) {
    const int64_t query_end = query_ends[document], key_end = key_ends[document];
    for (; query < query_end; ++query) {
      const int64_t own_key = query - query_end + key_end;  // aligned to the bottom right
      const int64_t first = std::clamp(own_key - left, first_of_document, key_end);
      const int64_t end = std::clamp(own_key + right + 1, first, key_end);
      first_key_[query] = static_cast<int32_t>(first);
      end_key_[query] = static_cast<int32_t>(end);
      all_see_all = all_see_all && first == 0 && end == options.num_keys;
    }
    first_of_document = key_end;
  }
  if (all_see_all) return;
  view_.first_key = first_key_.data();
  view_.end_key = end_key_.data();
}

void VisibilityStorage::mark_seen_by_intervals() {
  std::vector<int32_t> change(view_.num_keys + 1);  // in the number of queries that see a key, from the one before
  does_query_see_.resize(view_.num_queries);
  for (int64_t query = 0; query < view_.num_queries; ++query) {
    ++change[first_key_[query]];
    --change[end_key_[query]];
    does_query_see_[query] = first_key_[query] < end_key_[query];
  }
  is_key_seen_.resize(view_.num_keys);
  int32_t num_seeing = 0;
  for (int64_t key = 0; key < view_.num_keys; ++key) is_key_seen_[key] = (num_seeing += change[key]) > 0;
}

void VisibilityStorage::map_mask(const VisibilityOptions& options) {
  const AttentionMask& mask = options.mask;
  const int64_t query_blocks = num_attention_blocks(options.num_queries);
  const int64_t key_blocks = num_attention_blocks(options.num_keys);
  const int64_t num_entries = mask.batch_size * mask.num_heads, num_blocks = num_entries * query_blocks * key_blocks;
  states_.resize(num_blocks);
  words_.reset(new uint64_t[num_blocks * kAttentionBlock]);
  does_query_see_.resize(num_entries * options.num_queries);
  std::vector<uint64_t> seen_keys(num_blocks);  // bit k: some query of the block sees key k
  for_each_strip(mask, options.num_queries, options.num_keys, [&](const MaskStrip& strip, int64_t number) {
    const StripIntervals intervals(view_, strip);
    uint64_t sees[64] = {}, rows[64];
    for (int64_t key_block = 0; key_block < key_blocks; ++key_block) {
      if (!intervals.meets(key_block * 64)) continue;  // stays empty
      const int64_t index = number * key_blocks + key_block;
      states_[index] = strip.block(key_block).read(rows);
      if (states_[index] == BlockState::empty) continue;
      if (states_[index] == BlockState::mixed) {
        uint64_t words[64];
        std::copy(rows, rows + 64, words);
        transpose_bits(words);
        std::copy(words, words + 64, &words_[index * kAttentionBlock]);
      }
      intervals.apply(rows, strip.num_rows(), key_block * 64);
      for (int r = 0; r < 64; ++r) {
        sees[r] |= rows[r];
        seen_keys[index] |= rows[r];
      }
    }
    uint8_t* does_see = &does_query_see_[strip.entry * options.num_queries + strip.first_query];
    for (int r = 0; r < strip.num_rows(); ++r) does_see[r] = sees[r] != 0;
  });
  view_.map.states = states_.data();
  view_.map.words = words_.get();
  mark_seen_keys(options, seen_keys);
}

void VisibilityStorage::mark_seen_keys(const VisibilityOptions& options, const std::vector<uint64_t>& seen_keys) {
  const int64_t num_mask_heads = options.mask.num_heads;
  view_.seen_key_heads = num_mask_heads == 1 ? 1 : options.num_key_heads;
  const int64_t key_blocks = num_attention_blocks(options.num_keys);
  // A key is seen if a query of any block, and of any head of its group, sees it.
  const int64_t num_strips = num_mask_heads / view_.seen_key_heads * num_attention_blocks(options.num_queries);
  const int64_t num_rows = options.mask.batch_size * view_.seen_key_heads;
  is_key_seen_.resize(num_rows * options.num_keys);
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int64_t key_block = 0; key_block < key_blocks; ++key_block) {
      uint64_t seen = 0;
      for (int64_t strip = 0; strip < num_strips; ++strip) {
        seen |= seen_keys[(row * num_strips + strip) * key_blocks + key_block];
      }
      const int64_t first_key = key_block * 64, num_columns = std::min<int64_t>(options.num_keys - first_key, 64);
      uint8_t* is_seen = &is_key_seen_[row * options.num_keys + first_key];
      for (int64_t c = 0; c < num_columns; ++c) is_seen[c] = seen >> c & 1;
    }
  }
}

void map_blocks(
    const AttentionMask& mask, int64_t num_queries, int64_t num_keys, BlockState* states, uint64_t* words) {
  const int64_t key_blocks = num_attention_blocks(num_keys);
  for_each_strip(mask, num_queries, num_keys, [&](const MaskStrip& strip, int64_t number) {
    for (int64_t index = number * key_blocks; index < (number + 1) * key_blocks; ++index) {
      uint64_t rows[64];
      states[index] = strip.block(index - number * key_blocks).read(rows);
      transpose_bits(rows);
      std::copy(rows, rows + 64, words + index * kAttentionBlock);
    }
  });
}

}  // namespace lmopt
