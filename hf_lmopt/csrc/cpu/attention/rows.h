// Rows of query, key, value, bias and gradients, from their own type to words or float32 and back.
#pragma once

#include "attention/attention.h"
#include "cpu/attention/products.h"
#include "cpu/convert.h"

namespace lmopt {
namespace LMOPT_INSTRUCTION_SET {

inline int64_t size_of(ElementType type) {
  return type == ElementType::float32 ? 4 : 2;
}

// Whether the elements are what the products work on, so that rows can be read as words where they lie.
template <class Products>
inline bool is_native(ElementType type) {
  return type == (Products::kIsBfloat16 ? ElementType::bfloat16 : ElementType::float32);
}

template <class Products>
inline int64_t words_per_row(int64_t head_size) {
  return (head_size + Products::kPerWord - 1) / Products::kPerWord;
}

inline int64_t round_up(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

inline const char* row_address(const AttentionTensor& tensor, ElementType type, int64_t b, int64_t h, int64_t row) {
  const int64_t element = b * tensor.batch_stride + h * tensor.head_stride + row * tensor.row_stride;
  return static_cast<const char*>(tensor.data) + element * size_of(type);
}

inline char* writable_row(const AttentionTensor& tensor, ElementType type, int64_t b, int64_t h, int64_t row) {
  return const_cast<char*>(row_address(tensor, type, b, h, row));
}

inline void to_float32(ElementType type, const void* source, float* target, int64_t count) {
  switch (type) {
    case ElementType::float32:
      std::memcpy(target, source, count * sizeof(float));
      break;
    case ElementType::bfloat16:
      bfloat16_to_float32(static_cast<const uint16_t*>(source), target, count);
      break;
    case ElementType::float16:
      float16_to_float32(static_cast<const uint16_t*>(source), target, count);
      break;
  }
}

inline void from_float32(const float* source, ElementType type, void* target, int64_t count) {
  switch (type) {
    case ElementType::float32:
      std::memcpy(target, source, count * sizeof(float));
      break;
    case ElementType::bfloat16:
      float32_to_bfloat16(source, static_cast<uint16_t*>(target), count);
      break;
    case ElementType::float16:
      float32_to_float16(source, static_cast<uint16_t*>(target), count);
      break;
  }
}

// One row as words, filled up with zeros to `padded_words`.
template <class Products>
inline void load_words(ElementType type, const char* row, int64_t head_size, int64_t padded_words, float* target) {
  std::memset(target, 0, padded_words * sizeof(float));
  if (is_native<Products>(type)) {
    std::memcpy(target, row, head_size * size_of(type));
  } else {
    to_float32(type, row, target, head_size);
  }
}

template <class Products>
inline void store_words(const float* words, ElementType type, char* row, int64_t head_size) {
  if (is_native<Products>(type)) {
    std::memcpy(row, words, head_size * size_of(type));
  } else {
    from_float32(words, type, row, head_size);
  }
}

// Turns kLanes rows of words into the lanes of as many vectors; address gives the words of a row, null for zeros.
template <class Address>
LMOPT_INLINE void turn_rows(const Address& address, int first_row, int64_t word, float* target) {
  Vector rows[kLanes];
  LMOPT_UNROLL
  for (int k = 0; k < kLanes; ++k) {
    const float* source = address(first_row + k);
    rows[k] = source == nullptr ? Vector{} : load(source + word);
  }
  transpose(rows);
  LMOPT_UNROLL
  for (int k = 0; k < kLanes; ++k) store(target + (word + k) * kAttentionBlock + first_row, rows[k]);
}

// A block of rows as words with the rows in the lanes: target[word][row] for 64 rows, of which `count` exist; address
// gives the row of a lane, null for one to be taken as zeros. `staging` holds 64 rows of words, in multiples of 16.
template <class Products, class Address>
inline void load_transposed(
    ElementType type, int64_t head_size, int count, const Address& address, float* staging, float* target) {
  const int64_t words = words_per_row<Products>(head_size), padded = round_up(words, kPanel);
  const bool is_direct = is_native<Products>(type) && head_size % (kPanel * Products::kPerWord) == 0;
  const float* rows[kAttentionBlock];
  const int num_rows = static_cast<int>(round_up(count, kPanel));
  for (int row = 0; row < num_rows; ++row) {
    const char* source = row < count ? address(row) : nullptr;
    rows[row] = reinterpret_cast<const float*>(source);
    if (source == nullptr || is_direct) continue;
    load_words<Products>(type, source, head_size, padded, staging + row * padded);
    rows[row] = staging + row * padded;
  }
  for (int row = 0; row < num_rows; row += kLanes) {
    for (int64_t word = 0; word < padded; word += kLanes) {
      turn_rows([&](int r) { return rows[r]; }, row, word, target);
    }
  }
}

// [head size][64 queries] has so many rows, since whole squares of words are turned.
inline int64_t padded_head_rows(int64_t head_size) {
  return round_up(head_size, 2 * kPanel);
}

// Rows of float32 with the rows in the lanes, source[element][row], to rows of their own type, each times its factor.
// `staging` holds 16 rows of words, in multiples of 16.
template <class Products, class Address>
inline void store_transposed(
    const float* source, const float* factors, ElementType type, int64_t head_size, int count, const Address& address,
    float* staging) {
  const int64_t words = words_per_row<Products>(head_size), padded = round_up(words, kPanel);
  const bool is_direct = is_native<Products>(type) && head_size % (kPanel * Products::kPerWord) == 0;
  for (int first = 0; first < count; first += kLanes) {
    const int rows = count - first < kLanes ? count - first : kLanes;
    const Vector factor = load(factors + first);
    float* targets[kLanes];
    for (int k = 0; k < rows; ++k) {
      targets[k] = is_direct ? reinterpret_cast<float*>(address(first + k)) : staging + k * padded;
    }
    for (int64_t word = 0; word < padded; word += kLanes) {
      Vector turned[kLanes];
      LMOPT_UNROLL
      for (int k = 0; k < kLanes; ++k) {
        const float* elements = source + (word + k) * Products::kPerWord * kAttentionBlock + first;
        turned[k] = Products::load_word(elements, kAttentionBlock, factor);
      }
      transpose(turned);
      for (int k = 0; k < rows; ++k) store(targets[k] + word, turned[k]);
    }
    if (is_direct) continue;
    for (int k = 0; k < rows; ++k) store_words<Products>(targets[k], type, address(first + k), head_size);
  }
}

// Pairs of neighbouring rows of bfloat16, interleaved: word i of a pair has element i of both. A null row counts as
// zeros.
inline void interleave_rows(const char* first, const char* second, int64_t head_size, float* target) {
  const uint16_t* a = reinterpret_cast<const uint16_t*>(first);
  const uint16_t* b = reinterpret_cast<const uint16_t*>(second);
  uint32_t* words = reinterpret_cast<uint32_t*>(target);
  if (a != nullptr && b != nullptr) {
    for (int64_t i = 0; i < head_size; ++i) words[i] = a[i] | static_cast<uint32_t>(b[i]) << 16;
  } else {
    for (int64_t i = 0; i < head_size; ++i) {
      words[i] = (a == nullptr ? 0 : a[i]) | static_cast<uint32_t>(b == nullptr ? 0 : b[i]) << 16;
    }
  }
}

}  // namespace LMOPT_INSTRUCTION_SET
}  // namespace lmopt
