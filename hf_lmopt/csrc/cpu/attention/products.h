// The one matrix product of attention: broadcast words of `a` times vectors of `b`, in a tile of registers.
//
//   sum[row][lane] += a[row][step] * b[step][lane]          over the steps
//
// A word is four bytes: a float32, or a pair of neighbouring bfloat16 whose two products are added in one step. In
// both cases scores, weights and gradients of 64 queries are such a `b`, with queries in the lanes, so that maxima and
// sums over keys are plain vector operations, and keys and values are an `a`, which needs no packing.
#pragma once

#include "cpu/attention/vector.h"

namespace lmopt {
namespace LMOPT_INSTRUCTION_SET {

template <int value>
struct Int {
  static constexpr int kValue = value;
};

struct Float32Products {
  static constexpr bool kIsBfloat16 = false;
  static constexpr int kPerWord = 1;

  static LMOPT_INLINE Vector multiply_add(Vector a, Vector b, Vector sum) {
    return LMOPT_INSTRUCTION_SET::multiply_add(a, b, sum);
  }

  // The word that the elements at `source` and below it make, each times a factor.
  static LMOPT_INLINE Vector load_word(const float* source, int64_t, Vector factor) { return load(source) * factor; }
};

#if defined(__AVX512BF16__)
struct Bfloat16Products {
  static constexpr bool kIsBfloat16 = true;
  static constexpr int kPerWord = 2;

  static LMOPT_INLINE Vector multiply_add(Vector a, Vector b, Vector sum) {
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }

  // Word i is the pair of lane i of both, the first in the lower half.
  static LMOPT_INLINE Vector pair(Vector first, Vector second) {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(halves));
    const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(halves, 1));
    return (Vector)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }

  static LMOPT_INLINE Vector load_word(const float* source, int64_t stride, Vector factor) {
    return pair(load(source) * factor, load(source + stride) * factor);
  }

  // Sixteen values as eight words, each a pair of neighbours.
  static LMOPT_INLINE void store_neighbours(float* target, Vector value) {
    const __m256bh halves = _mm512_cvtneps_pbh((__m512)value);
    std::memcpy(target, &halves, sizeof(halves));
  }
};
#endif

// How many rows fill the registers beside that many panels: 24 sums of 32 registers, 12 of 16 with AVX2, 8 else.
#if defined(__AVX512F__)
constexpr int kMaxTilePanels = 4;
template <int panels>
constexpr int kTileRows = panels == 4 ? 6 : panels == 3 ? 8 : panels == 2 ? 12 : 16;
#else
constexpr int kMaxTilePanels = 1;
template <int panels>
constexpr int kTileRows = kLanes == 8 ? 6 : 2;
#endif

template <class Products, int rows, int vectors>
LMOPT_INLINE void multiply(
    const char* a, int64_t a_row_bytes, int64_t a_step_bytes, const float* b, int64_t b_step, int64_t steps,
    Vector (&sum)[rows][vectors]) {
  for (int64_t step = 0; step < steps; ++step) {
    Vector lanes[vectors];
    LMOPT_UNROLL
    for (int v = 0; v < vectors; ++v) lanes[v] = load(b + v * kLanes);
    LMOPT_UNROLL
    for (int row = 0; row < rows; ++row) {
      const Vector word = broadcast_word(a + row * a_row_bytes);
      LMOPT_UNROLL
      for (int v = 0; v < vectors; ++v) sum[row][v] = Products::multiply_add(word, lanes[v], sum[row][v]);
    }
    a += a_step_bytes;
    b += b_step;
  }
}

template <int rows, int vectors>
LMOPT_INLINE void set_zero(Vector (&sum)[rows][vectors]) {
  LMOPT_UNROLL
  for (int row = 0; row < rows; ++row) {
    LMOPT_UNROLL
    for (int v = 0; v < vectors; ++v) sum[row][v] = Vector{};
  }
}

// Each tile starts at 0 and is added as a whole, since a long sum that grows by single products is less exact.
template <int rows, int vectors>
LMOPT_INLINE void add_tile(float* target, int64_t stride, const Vector (&tile)[rows][vectors]) {
  LMOPT_UNROLL
  for (int row = 0; row < rows; ++row) {
    LMOPT_UNROLL
    for (int v = 0; v < vectors; ++v) {
      float* place = target + row * stride + v * kLanes;
      store(place, load(place) + tile[row][v]);
    }
  }
}

// Calls body(Int<panels>, first) for tiles that cover the panels.
template <class Body>
LMOPT_INLINE void for_each_tile_of_panels(int first, int end, const Body& body) {
  if constexpr (kMaxTilePanels == 4) {
    switch (end - first) {
      case 4:
        return body(Int<4>{}, first);
      case 3:
        return body(Int<3>{}, first);
      case 2:
        return body(Int<2>{}, first);
      case 1:
        return body(Int<1>{}, first);
    }
  } else {
    for (; first < end; ++first) body(Int<1>{}, first);
  }
}

// Calls body(Int<rows>, first) for tiles that cover `count` rows.
template <int tile_rows, class Body>
LMOPT_INLINE void for_each_tile_of_rows(int64_t count, const Body& body) {
  int64_t row = 0;
  for (; row + tile_rows <= count; row += tile_rows) body(Int<tile_rows>{}, row);
  if constexpr (tile_rows > 4) {
    for (; row + 4 <= count; row += 4) body(Int<4>{}, row);
  }
  for (; row + 2 <= count; row += 2) body(Int<2>{}, row);
  if (row < count) body(Int<1>{}, row);
}

}  // namespace LMOPT_INSTRUCTION_SET
}  // namespace lmopt
