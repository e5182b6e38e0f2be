// Matrices of bfloat16 in panels, and products of them that accumulate in float32 (vdpbf16ps).
//
// A panel has 16 columns. Rows go in pairs, the operand that vdpbf16ps takes: element (i, j) is half i % 2 of word
// ((j / 16) * row_pairs + i / 2) * 16 + j % 16. Both sizes are padded with zeros to multiples of 16. Every product here
// has its shared index down the panels of both operands, so one kernel serves all.
//
// For files named *_avx512_bf16.cpp only; see cpu/capability.h.
#pragma once

// GCC 12 takes the undefined operand inside its own intrinsics for a mistake of the caller.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <cstdint>

namespace lmopt {
namespace avx512_bf16 {
namespace {

#define LMOPT_UNROLL _Pragma("GCC unroll 16")

constexpr int64_t kPanel = 16;  // columns of a panel: one vector of words
constexpr int kTileRows = 8;    // a tile of 8 rows by 3 vectors keeps 24 sums in registers
constexpr int kTileVectors = 3;

int64_t round_up(int64_t size) {
  return (size + kPanel - 1) / kPanel * kPanel;
}

// How many tiles wide a matrix is.
int64_t blocks_of_panels(int64_t columns) {
  return (round_up(columns) / kPanel + kTileVectors - 1) / kTileVectors;
}

struct Panels {
  uint32_t* words;
  int64_t row_pairs;

  uint32_t* at(int64_t row_pair, int64_t panel) const { return words + (panel * row_pairs + row_pair) * kPanel; }
};

__m512 first_rows(__m512i words) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}

__m512 second_rows(__m512i words) {
  return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

// Rounds two rows of 16 columns into words.
__m512i pack_rows(__m512 first, __m512 second) {
  const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
  const __m512i order = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16,
      0);
  return _mm512_permutexvar_epi16(order, halves);
}

// Transposes a block of 16 rows (8 row pairs, consecutive) and 16 columns.
void transpose_block(const uint32_t* source, uint32_t* target) {
  // Within 64 bits, columns 2q and 2q + 1 of two rows: swap the middle halves. Then 8 x 8 units of 64 bits.
  const __m512i swap_middle =
      _mm512_broadcast_i32x4(_mm_set_epi8(15, 14, 11, 10, 13, 12, 9, 8, 7, 6, 3, 2, 5, 4, 1, 0));
  __m512i row[8], pair[8], quad[8];
  LMOPT_UNROLL for (int i = 0; i < 8; ++i) {
    row[i] = _mm512_shuffle_epi8(_mm512_loadu_si512(source + i * kPanel), swap_middle);
  }
  LMOPT_UNROLL for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm512_unpacklo_epi64(row[i], row[i + 1]);
    pair[i + 1] = _mm512_unpackhi_epi64(row[i], row[i + 1]);
  }
  LMOPT_UNROLL for (int i = 0; i < 8; i += 4) {
    LMOPT_UNROLL for (int odd = 0; odd < 2; ++odd) {
      quad[i + odd] = _mm512_shuffle_i64x2(pair[i + odd], pair[i + 2 + odd], 0x88);
      quad[i + 2 + odd] = _mm512_shuffle_i64x2(pair[i + odd], pair[i + 2 + odd], 0xdd);
    }
  }
  // quad[i + u] has the units u and u + 4 of the rows i to i + 3, for u from 0 to 3.
  LMOPT_UNROLL for (int unit = 0; unit < 4; ++unit) {
    const __m512i low = quad[unit], high = quad[4 + unit];
    _mm512_storeu_si512(target + unit * kPanel, _mm512_shuffle_i64x2(low, high, 0x88));
    _mm512_storeu_si512(target + (unit + 4) * kPanel, _mm512_shuffle_i64x2(low, high, 0xdd));
  }
}

// sum[r][v] = sum over k of left(k, r) * right(k, 16 v + lane), 8 rows and kVectors panels.
template <int kVectors>
inline __attribute__((always_inline)) void sum_tile(
    const uint32_t* left, const uint32_t* right, int64_t row_pairs, __m512 (&sum)[kTileRows][kVectors]) {
  LMOPT_UNROLL for (int r = 0; r < kTileRows; ++r) {
    LMOPT_UNROLL for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_setzero_ps();
  }
  const int64_t panel_words = row_pairs * kPanel;
  for (int64_t k = 0; k < row_pairs; ++k, left += kPanel, right += kPanel) {
    __m512bh columns[kVectors];
    LMOPT_UNROLL for (int v = 0; v < kVectors; ++v) {
      columns[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(right + v * panel_words));
    }
    LMOPT_UNROLL for (int r = 0; r < kTileRows; ++r) {
      const __m512bh row = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(left[r])));
      LMOPT_UNROLL for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], row, columns[v]);
    }
  }
}

// target(i, j) = scale * sum over k of left(k, i) * right(k, j)
//                + row_factor[i] * right(i, j) + column_factor[j] * left(i, j)
// The last two terms are left out where their factor is null. With a diagonal, the target's goes there.
struct Product {
  Panels left, right, target;
  float scale;
  const float* row_factor;
  const float* column_factor;
  float* diagonal;
};

// Moves one lane out, and puts zero in its place.
__m512 take_lane(__m512 row, int64_t lane, float* target) {
  const __mmask16 mask = static_cast<__mmask16>(1 << lane);
  *target = _mm512_mask_reduce_add_ps(mask, row);
  return _mm512_maskz_mov_ps(static_cast<__mmask16>(~mask), row);
}

// Tile of 8 rows from `row` on, and kVectors panels from `panel` on. In a symmetric target, row / kPanel <= panel.
template <int kVectors>
void compute_tile(const Product& product, int64_t row, int64_t panel) {
  const Panels &left = product.left, &right = product.right;
  __m512 sum[kTileRows][kVectors];
  sum_tile<kVectors>(left.at(0, row / kPanel) + row % kPanel, right.at(0, panel), left.row_pairs, sum);
  const __m512 scale = _mm512_set1_ps(product.scale);
  const bool has_diagonal = product.diagonal != nullptr && row / kPanel == panel;
  LMOPT_UNROLL for (int r = 0; r < kTileRows; r += 2) {
    const int64_t row_pair = (row + r) / 2;
    LMOPT_UNROLL for (int v = 0; v < kVectors; ++v) {
      __m512 first = _mm512_mul_ps(sum[r][v], scale), second = _mm512_mul_ps(sum[r + 1][v], scale);
      if (product.row_factor != nullptr) {
        const float* factor = product.row_factor + row + r;
        const __m512i words = _mm512_loadu_si512(right.at(row_pair, panel + v));
        first = _mm512_fmadd_ps(_mm512_set1_ps(factor[0]), first_rows(words), first);
        second = _mm512_fmadd_ps(_mm512_set1_ps(factor[1]), second_rows(words), second);
      }
      if (product.column_factor != nullptr) {
        const __m512 factor = _mm512_loadu_ps(product.column_factor + (panel + v) * kPanel);
        const __m512i words = _mm512_loadu_si512(left.at(row_pair, panel + v));
        first = _mm512_fmadd_ps(factor, first_rows(words), first);
        second = _mm512_fmadd_ps(factor, second_rows(words), second);
      }
      if (v == 0 && has_diagonal) {
        first = take_lane(first, row % kPanel + r, product.diagonal + row + r);
        second = take_lane(second, row % kPanel + r + 1, product.diagonal + row + r + 1);
      }
      _mm512_storeu_si512(product.target.at(row_pair, panel + v), pack_rows(first, second));
    }
  }
}

void compute_tile(const Product& product, int64_t row, int64_t panel, int64_t end) {
  switch (end - panel) {
    case 1:
      return compute_tile<1>(product, row, panel);
    case 2:
      return compute_tile<2>(product, row, panel);
    default:
      return compute_tile<3>(product, row, panel);
  }
}

#undef LMOPT_UNROLL

}  // namespace
}  // namespace avx512_bf16
}  // namespace lmopt
