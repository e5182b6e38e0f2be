// Rows of bfloat16 and float16 to float32 and back, rounded to nearest even as torch does; a NaN stays one.
#pragma once

#include <cstdint>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace lmopt {
namespace LMOPT_INSTRUCTION_SET {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

inline void bfloat16_to_float32(const uint16_t* source, float* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = float_of(static_cast<uint32_t>(source[i]) << 16);
}

inline void float32_to_bfloat16(const float* source, uint16_t* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = bits_of(source[i]);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    target[i] = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
}

inline float float16_element_to_float32(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7fff;
  // Moving the exponent by a product also makes subnormal numbers normal.
  const float scaled = float_of(magnitude << 13) * 0x1p112f;
  return float_of(sign | (magnitude >= 0x7c00 ? (0x7f800000 | (magnitude << 13)) : bits_of(scaled)));
}

inline uint16_t float32_element_to_float16(float value) {
  const uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  // Adding 2^-1 rounds what will be subnormal (steps of 2^-24) in the adder.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  uint32_t half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x477ff000 ? 0x7c00 : half;
  half = magnitude > 0x7f800000 ? 0x7e00 : half;
  return static_cast<uint16_t>(sign | half);
}

inline void float16_to_float32(const uint16_t* source, float* target, int64_t count) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i));
    _mm256_storeu_ps(target + i, _mm256_cvtph_ps(halves));
  }
#endif
  for (; i < count; ++i) target[i] = float16_element_to_float32(source[i]);
}

inline void float32_to_float16(const float* source, uint16_t* target, int64_t count) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i), halves);
  }
#endif
  for (; i < count; ++i) target[i] = float32_element_to_float16(source[i]);
}

}  // namespace LMOPT_INSTRUCTION_SET
}  // namespace lmopt
