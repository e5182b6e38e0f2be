// Which weights dropout keeps, by Philox4x32-10; hf_lmopt/attention/philox.py says which word belongs to which weight.
#pragma once

#include "cpu/attention/query_block.h"

namespace lmopt {
namespace LMOPT_INSTRUCTION_SET {

// The upper and lower halves of the products with one word.
LMOPT_INLINE void multiply_wide(UIntVector a, uint32_t b, UIntVector& high, UIntVector& low) {
#if defined(__AVX512F__)
  const __m512i factor = _mm512_set1_epi32(static_cast<int>(b));
  const __m512i even = _mm512_mul_epu32((__m512i)a, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), factor);
  high = (UIntVector)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
  low = (UIntVector)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
#elif defined(__AVX2__)
  const __m256i factor = _mm256_set1_epi32(static_cast<int>(b));
  const __m256i even = _mm256_mul_epu32((__m256i)a, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), factor);
  high = (UIntVector)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  low = (UIntVector)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
#else
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t product = static_cast<uint64_t>(a[i]) * b;
    high[i] = static_cast<uint32_t>(product >> 32);
    low[i] = static_cast<uint32_t>(product);
  }
#endif
}

LMOPT_INLINE uint32_t bits_at_least(UIntVector a, uint32_t threshold) {
#if defined(__AVX512F__)
  return _mm512_cmpge_epu32_mask((__m512i)a, _mm512_set1_epi32(static_cast<int>(threshold)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(a[i] >= threshold) << i;
  return bits;
#endif
}

class Dropout {
 public:
  explicit Dropout(const AttentionCall& call)
      : seed_(call.dropout_seed),
        threshold_(static_cast<uint32_t>(static_cast<double>(call.dropout_p) * 4294967296.0)) {}

  // Bit r of word k: whether row r keeps key k of the block of keys; for four keys at a time.
  void find_kept(const QueryBlock& block, int64_t key_block, uint64_t (&kept)[kAttentionBlock]) const {
    for (uint64_t& word : kept) word = 0;
    for (int row = 0; row < block.num_rows(); row += kLanes) {
      UIntVector query, head;
      for (int i = 0; i < kLanes; ++i) {
        const int existing = row + i < block.num_rows() ? row + i : row;
        query[i] = static_cast<uint32_t>(block.query_of(existing));
        head[i] = static_cast<uint32_t>(block.head_of(existing));
      }
      for (int k = 0; k < kAttentionBlock; k += 4) {
        const uint32_t key_group = static_cast<uint32_t>((key_block * kAttentionBlock + k) / 4);
        const uint32_t batch = static_cast<uint32_t>(block.batch);
        UIntVector words[4] = {UIntVector{} + key_group, query, head, UIntVector{} + batch};
        encrypt(words);
        LMOPT_UNROLL
        for (int i = 0; i < 4; ++i) kept[k + i] |= static_cast<uint64_t>(bits_at_least(words[i], threshold_)) << row;
      }
    }
  }

 private:
  LMOPT_INLINE void encrypt(UIntVector (&words)[4]) const {
    uint32_t key0 = static_cast<uint32_t>(seed_), key1 = static_cast<uint32_t>(seed_ >> 32);
    LMOPT_UNROLL
    for (int round = 0; round < 10; ++round) {
      UIntVector high0, low0, high1, low1;
      multiply_wide(words[0], 0xD2511F53u, high0, low0);
      multiply_wide(words[2], 0xCD9E8D57u, high1, low1);
      words[0] = high1 ^ words[1] ^ key0;
      words[1] = low1;
      words[2] = high0 ^ words[3] ^ key1;
      words[3] = low0;
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
  }

  uint64_t seed_;
  uint32_t threshold_;
};

}  // namespace LMOPT_INSTRUCTION_SET
}  // namespace lmopt
