// 64 by 64 bits.
#pragma once

#include <cstdint>

namespace lmopt {

// Bit j of word i and bit i of word j change places; by squares of half the size each time (Warren, Hacker's Delight,
// 7-3).
static inline void transpose_bits(uint64_t (&words)[64]) {
  uint64_t low = 0x00000000ffffffffull;
  for (int half = 32; half > 0; half >>= 1, low ^= low << half) {
    for (int i = 0; i < 64; i = ((i | half) + 1) & ~half) {
      const uint64_t swapped = ((words[i] >> half) ^ words[i | half]) & low;
      words[i] ^= swapped << half;
      words[i | half] ^= swapped;
    }
  }
}

// Bits [first, end), which are clamped to 0 and 64.
static inline uint64_t bits_between(int64_t first, int64_t end) {
  first = first < 0 ? 0 : first;
  end = end > 64 ? 64 : end;
  if (first >= end) return 0;
  const uint64_t below_end = end == 64 ? ~0ull : (1ull << end) - 1;
  return below_end & ~((1ull << first) - 1);
}

}  // namespace lmopt
