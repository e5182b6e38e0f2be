// Keys and values of one head in blocks of 64, as the products read them: where they lie if they can be, else copied.
#pragma once

#include "cpu/attention/rows.h"
#include "cpu/attention/workspace.h"

namespace lmopt {
namespace LMOPT_INSTRUCTION_SET {

// Rows of words; neighbouring rows are `row_bytes` apart.
struct WordRows {
  const char* data;
  int64_t row_bytes;
};

// As the tensor has them, or bfloat16 interleaved by two, for products that add over keys (float32 needs no pairs).
enum class KeyArrangement { rows, pairs };

// One of the two tensors. What no query sees is copied as zeros, whatever it holds.
template <class Products>
class KeyBlocks {
 public:
  KeyBlocks(const AttentionCall& call, const AttentionTensor& tensor, KeyArrangement arrangement)
      : call_(call), tensor_(tensor), as_pairs_(arrangement == KeyArrangement::pairs && Products::kIsBfloat16) {}

  void plan(Workspace& workspace) {
    place_ = workspace.plan(may_copy() ? num_attention_blocks(call_.num_keys) * block_words() : 0);
    flags_place_ = workspace.plan(num_attention_blocks(call_.num_keys) / 4 + 1);
  }

  void take(const Workspace& workspace) {
    copies_ = workspace.at(place_);
    is_copied_ = reinterpret_cast<uint8_t*>(workspace.at(flags_place_));
    batch_ = head_ = -1;
  }

  void set_head(int64_t batch, int64_t key_head) {
    if (batch == batch_ && key_head == head_) return;
    batch_ = batch, head_ = key_head;
    std::memset(is_copied_, 0, num_attention_blocks(call_.num_keys));
    seen_ = call_.visibility->keys_seen(batch, key_head);
  }

  WordRows block(int64_t index) {
    const int64_t first = index * kAttentionBlock;
    if (!needs_copy(first)) {
      return {row_address(tensor_, call_.type, batch_, head_, first), tensor_.row_stride * size_of(call_.type)};
    }
    float* copy = copies_ + index * block_words();
    if (!is_copied_[index]) {
      as_pairs_ ? copy_pairs(first, copy) : copy_rows(first, copy);
      is_copied_[index] = 1;
    }
    return {reinterpret_cast<const char*>(copy), row_words() * 4};
  }

 private:
  int64_t row_words() const { return as_pairs_ ? call_.head_size : words_per_row<Products>(call_.head_size); }
  int64_t block_words() const { return row_words() * (as_pairs_ ? kAttentionBlock / 2 : kAttentionBlock); }
  int num_rows(int64_t first) const {
    return static_cast<int>(call_.num_keys - first < kAttentionBlock ? call_.num_keys - first : kAttentionBlock);
  }

  bool is_unreadable() const {
    return as_pairs_ || !is_native<Products>(call_.type) || call_.head_size % Products::kPerWord != 0;
  }
  bool may_copy() const { return is_unreadable() || call_.visibility->is_key_seen != nullptr; }

  bool needs_copy(int64_t first) const {
    if (is_unreadable()) return true;
    return seen_ != nullptr && std::memchr(seen_ + first, 0, num_rows(first)) != nullptr;
  }

  // Null where it counts as zeros.
  const char* row(int64_t key) const {
    if (key >= call_.num_keys || (seen_ != nullptr && !seen_[key])) return nullptr;
    return row_address(tensor_, call_.type, batch_, head_, key);
  }

  void copy_rows(int64_t first, float* target) const {
    for (int i = 0; i < num_rows(first); ++i, target += row_words()) {
      const char* source = row(first + i);
      if (source == nullptr) {
        std::memset(target, 0, row_words() * sizeof(float));
      } else {
        load_words<Products>(call_.type, source, call_.head_size, row_words(), target);
      }
    }
  }

  void copy_pairs(int64_t first, float* target) const {
    for (int i = 0; i < num_rows(first); i += 2, target += row_words()) {
      interleave_rows(row(first + i), row(first + i + 1), call_.head_size, target);
    }
  }

  const AttentionCall& call_;
  const AttentionTensor& tensor_;
  const bool as_pairs_;
  int64_t place_ = 0, flags_place_ = 0;
  float* copies_ = nullptr;
  uint8_t* is_copied_ = nullptr;
  const uint8_t* seen_ = nullptr;
  int64_t batch_ = -1, head_ = -1;
};

}  // namespace LMOPT_INSTRUCTION_SET
}  // namespace lmopt
