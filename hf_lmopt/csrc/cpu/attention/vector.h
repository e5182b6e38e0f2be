// Vectors of float32 as wide as the instruction set has them, and what the arithmetic of attention needs of them.
//
// GCC's and clang's vector types carry + - * / & | << and comparisons for all widths. Only what they lack is written
// by hand: multiply-add, extremes, selection by bits, bfloat16 pairs, and transposition.
//
// A panel is 16 queries: the lanes of one AVX-512 vector, two of AVX2, four of the portable version.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define LMOPT_INLINE inline __attribute__((always_inline))
#define LMOPT_UNROLL _Pragma("GCC unroll 32")

namespace lmopt {
namespace LMOPT_INSTRUCTION_SET {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVector __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UIntVector __attribute__((vector_size(4 * kLanes)));

constexpr int kPanel = 16;
constexpr int kPanels = 4;  // of a block of 64 queries
constexpr int kVectorsPerPanel = kPanel / kLanes;
constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.4426950408889634f;

LMOPT_INLINE Vector broadcast(float value) {
  return value - Vector{};
}

LMOPT_INLINE IntVector broadcast_int(int32_t value) {
  return value - IntVector{};
}

LMOPT_INLINE Vector load(const float* source) {
  Vector result;
  std::memcpy(&result, source, sizeof(result));
  return result;
}

LMOPT_INLINE void store(float* target, Vector value) {
  std::memcpy(target, &value, sizeof(value));
}

// Four bytes from any address, in all lanes: a float32, or two neighbouring bfloat16.
LMOPT_INLINE Vector broadcast_word(const char* source) {
  float word;
  std::memcpy(&word, source, sizeof(word));
  return broadcast(word);
}

LMOPT_INLINE Vector as_float(IntVector bits) {
  return (Vector)bits;
}

LMOPT_INLINE IntVector as_int(Vector value) {
  return (IntVector)value;
}

LMOPT_INLINE Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
  return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// The second where the first is NaN.
LMOPT_INLINE Vector maximum(Vector a, Vector b) {
#if defined(__AVX512F__)
  return (Vector)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vector)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// Lane i from `yes` where bit i is set, else from `no`.
LMOPT_INLINE Vector select_by_bits(uint32_t bits, Vector yes, Vector no) {
#if defined(__AVX512F__)
  return (Vector)_mm512_mask_blend_ps((__mmask16)bits, (__m512)no, (__m512)yes);
#else
  IntVector lane_bit;
  for (int i = 0; i < kLanes; ++i) lane_bit[i] = 1 << i;
  return (broadcast_int(static_cast<int32_t>(bits)) & lane_bit) != IntVector{} ? yes : no;
#endif
}

LMOPT_INLINE float sum_of_lanes(Vector value) {
  float sum = 0;
  LMOPT_UNROLL
  for (int i = 0; i < kLanes; ++i) sum += value[i];
  return sum;
}

// 2^x, x at most 127; 0 from -127 downwards, so that masked scores (-inf) give 0. The polynomials (minimax on
// [-1/2, 1/2] with the constant held at 1) have relative errors of 2e-7, enough beside bfloat16, and 3e-9.
template <bool is_for_bfloat16 = false>
LMOPT_INLINE Vector exp2(Vector x) {
  x = maximum(broadcast(-127.0f), x);  // of NaN NaN
  const Vector shifted = x + 12582912.0f;  // 1.5 * 2^23: the integer part ends up in the lowest bits
  const Vector fraction = x - (shifted - 12582912.0f);
  Vector power;
  if constexpr (is_for_bfloat16) {
    power = multiply_add(broadcast(1.326472731e-3f), fraction, broadcast(9.671512991e-3f));
    power = multiply_add(power, fraction, broadcast(5.550733581e-2f));
    power = multiply_add(power, fraction, broadcast(2.402224243e-1f));
    power = multiply_add(power, fraction, broadcast(6.931470037e-1f));
  } else {
    power = multiply_add(broadcast(1.559467816e-4f), fraction, broadcast(1.34066439e-3f));
    power = multiply_add(power, fraction, broadcast(9.617692973e-3f));
    power = multiply_add(power, fraction, broadcast(5.550310551e-2f));
    power = multiply_add(power, fraction, broadcast(2.402265278e-1f));
    power = multiply_add(power, fraction, broadcast(6.93147215e-1f));
  }
  power = multiply_add(power, fraction, broadcast(1.0f));
  return as_float((IntVector)((UIntVector)power + ((UIntVector)shifted << 23)));  // may wrap where x is too large
}

// Relative error below 3e-7: a polynomial near 0 (Cephes' tanhf), else by the exponential function.
LMOPT_INLINE Vector tanh(Vector x) {
  const IntVector sign = as_int(x) & broadcast_int(INT32_MIN);
  const Vector magnitude = as_float(as_int(x) ^ sign);
  const Vector square = x * x;
  Vector series = multiply_add(broadcast(-5.70498872745e-3f), square, broadcast(2.06390887954e-2f));
  series = multiply_add(series, square, broadcast(-5.37397155531e-2f));
  series = multiply_add(series, square, broadcast(1.33314422036e-1f));
  series = multiply_add(series, square, broadcast(-3.33332819422e-1f));
  const Vector near = multiply_add(series * square, magnitude, magnitude);
  const Vector inverse_power = exp2(magnitude * (-2 * kLog2E));
  const Vector far = (1.0f - inverse_power) / (1.0f + inverse_power);
  const Vector result = magnitude < broadcast(0.625f) ? near : far;
  return as_float(as_int(result) | sign);
}

// Natural logarithm of normal numbers above 0 (Cephes' logf), to 1e-7 of the larger of the result and 1.
LMOPT_INLINE Vector log(Vector x) {
  // x = 2^exponent * mantissa with a mantissa in [sqrt(1/2), sqrt(2)).
  const IntVector shifted = as_int(x) - broadcast_int(0x3f3504f3);
  const IntVector exponent = shifted >> 23;
  const Vector mantissa = as_float((shifted & broadcast_int(0x7fffff)) + broadcast_int(0x3f3504f3));
  const Vector y = mantissa - 1.0f, square = y * y;
  Vector series = multiply_add(broadcast(7.0376836292e-2f), y, broadcast(-1.1514610310e-1f));
  series = multiply_add(series, y, broadcast(1.1676998740e-1f));
  series = multiply_add(series, y, broadcast(-1.2420140846e-1f));
  series = multiply_add(series, y, broadcast(1.4249322787e-1f));
  series = multiply_add(series, y, broadcast(-1.6668057665e-1f));
  series = multiply_add(series, y, broadcast(2.0000714765e-1f));
  series = multiply_add(series, y, broadcast(-2.4999993993e-1f));
  series = multiply_add(series, y, broadcast(3.3333331174e-1f));
  Vector result = series * y * square;
  const Vector power = __builtin_convertvector(exponent, Vector);
  result = multiply_add(power, broadcast(-2.12194440e-4f), result);
  result = multiply_add(square, broadcast(-0.5f), result) + y;
  return multiply_add(power, broadcast(0.693359375f), result);
}

#if defined(__AVX512F__)

// A square of 16 by 16 words in place.
LMOPT_INLINE void transpose(Vector (&rows)[16]) {
  __m512 a[16], b[16];
  LMOPT_UNROLL
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm512_unpacklo_ps((__m512)rows[2 * i], (__m512)rows[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_ps((__m512)rows[2 * i], (__m512)rows[2 * i + 1]);
  }
  LMOPT_UNROLL
  for (int i = 0; i < 4; ++i) {
    LMOPT_UNROLL
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(a[4 * i + j]), high = _mm512_castps_pd(a[4 * i + 2 + j]);
      b[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      b[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  LMOPT_UNROLL
  for (int j = 0; j < 4; ++j) {
    const __m512 even = _mm512_shuffle_f32x4(b[j], b[4 + j], 0x88), odd = _mm512_shuffle_f32x4(b[j], b[4 + j], 0xdd);
    const __m512 even2 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0x88);
    const __m512 odd2 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0xdd);
    rows[j] = (Vector)_mm512_shuffle_f32x4(even, even2, 0x88);
    rows[8 + j] = (Vector)_mm512_shuffle_f32x4(even, even2, 0xdd);
    rows[4 + j] = (Vector)_mm512_shuffle_f32x4(odd, odd2, 0x88);
    rows[12 + j] = (Vector)_mm512_shuffle_f32x4(odd, odd2, 0xdd);
  }
}

#elif defined(__AVX2__)

// A square of 8 by 8 words in place.
LMOPT_INLINE void transpose(Vector (&rows)[8]) {
  __m256 a[8], b[8];
  LMOPT_UNROLL
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_ps((__m256)rows[2 * i], (__m256)rows[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_ps((__m256)rows[2 * i], (__m256)rows[2 * i + 1]);
  }
  LMOPT_UNROLL
  for (int i = 0; i < 2; ++i) {
    LMOPT_UNROLL
    for (int j = 0; j < 2; ++j) {
      b[4 * i + 2 * j] = _mm256_shuffle_ps(a[4 * i + j], a[4 * i + 2 + j], 0x44);
      b[4 * i + 2 * j + 1] = _mm256_shuffle_ps(a[4 * i + j], a[4 * i + 2 + j], 0xee);
    }
  }
  LMOPT_UNROLL
  for (int j = 0; j < 4; ++j) {
    rows[j] = (Vector)_mm256_permute2f128_ps(b[j], b[4 + j], 0x20);
    rows[4 + j] = (Vector)_mm256_permute2f128_ps(b[j], b[4 + j], 0x31);
  }
}

#else

LMOPT_INLINE void transpose(Vector (&rows)[4]) {
  Vector columns[4];
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) columns[i][j] = rows[j][i];
  }
  for (int i = 0; i < 4; ++i) rows[i] = columns[i];
}

#endif

// target[column][row] = source[row][column] for 16 rows and columns of words; strides in words.
LMOPT_INLINE void transpose_square(const float* source, int64_t source_stride, float* target, int64_t target_stride) {
  for (int i = 0; i < kPanel; i += kLanes) {
    for (int j = 0; j < kPanel; j += kLanes) {
      Vector rows[kLanes];
      LMOPT_UNROLL
      for (int k = 0; k < kLanes; ++k) rows[k] = load(source + (i + k) * source_stride + j);
      transpose(rows);
      LMOPT_UNROLL
      for (int k = 0; k < kLanes; ++k) store(target + (j + k) * target_stride + i, rows[k]);
    }
  }
}

}  // namespace LMOPT_INSTRUCTION_SET
}  // namespace lmopt
