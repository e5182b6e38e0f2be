// Rows of 8-bit codes that share one maximum to float32 and back: value = codebook[code] * absmax.
#pragma once

#include "cpu/convert.h"
#include "optim/codebook.h"

namespace lmopt {
namespace LMOPT_INSTRUCTION_SET {

// As integers, magnitudes have the order of the floats, and a NaN is the largest: it is never lost.
inline float largest_magnitude(const float* source, int count) {
  int32_t largest = 0;
  for (int i = 0; i < count; ++i) {
    const int32_t magnitude = static_cast<int32_t>(bits_of(source[i]) & 0x7fffffff);
    largest = magnitude > largest ? magnitude : largest;
  }
  return float_of(static_cast<uint32_t>(largest));
}

// A row of zeros stays one, and so does one whose largest magnitude has no inverse in float32 (below 3e-39).
inline float inverse_scale(float absmax) {
  return absmax < 0x1p-127f ? 0.0f : 1.0f / absmax;
}

#if defined(__AVX512F__)

// Entries of a table that is held in registers of 16, by their index.
template <int num_registers>
inline __m512 look_up(const float* table, __m512i index) {
  if constexpr (num_registers == 1) {
    return _mm512_permutexvar_ps(index, _mm512_load_ps(table));
  } else if constexpr (num_registers == 2) {
    return _mm512_permutex2var_ps(_mm512_load_ps(table), index, _mm512_load_ps(table + 16));
  } else {
    constexpr int half = num_registers / 2;
    const __mmask16 is_upper = _mm512_test_epi32_mask(index, _mm512_set1_epi32(16 * half));
    const __m512 lower = look_up<half>(table, index), upper = look_up<half>(table + 16 * half, index);
    return _mm512_mask_blend_ps(is_upper, lower, upper);
  }
}

inline __m512i step_down(__m512i node, __m512 value, __m512 midpoint) {
  const __m512i left = _mm512_add_epi32(node, node);
  const __mmask16 goes_right = _mm512_cmp_ps_mask(value, midpoint, _CMP_GT_OQ);
  return _mm512_mask_add_epi32(left, goes_right, left, _mm512_set1_epi32(1));
}

inline __mmask16 mask_of_first(int count) {
  return static_cast<__mmask16>(count < 16 ? (1 << count) - 1 : 0xffff);
}

inline void dequantize_row(const Codebook& codebook, float absmax, const uint8_t* codes, float* target, int count) {
  for (int i = 0; i < count; i += 16) {
    const __mmask16 mask = mask_of_first(count - i);
    const __m512i code = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, codes + i));
    const __m512 value = _mm512_mul_ps(look_up<16>(codebook.values, code), _mm512_set1_ps(absmax));
    _mm512_mask_storeu_ps(target + i, mask, value);
  }
}

inline void find_codes(const Codebook& codebook, const float* source, float scale, uint8_t* codes, int count) {
  const float* tree = codebook.tree;
  for (int i = 0; i < count; i += 16) {
    const __mmask16 mask = mask_of_first(count - i);
    const __m512 value = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, source + i), _mm512_set1_ps(scale));
    __m512i node = _mm512_set1_epi32(1);
    for (int level = 0; level < 4; ++level) node = step_down(node, value, look_up<1>(tree, node));
    node = step_down(node, value, look_up<1>(tree + 16, node));
    node = step_down(node, value, look_up<2>(tree + 32, node));
    node = step_down(node, value, look_up<4>(tree + 64, node));
    node = step_down(node, value, look_up<8>(tree + 128, node));
    _mm512_mask_cvtepi32_storeu_epi8(codes + i, mask, node);  // the low byte of 256 + code
  }
}

#else

inline void dequantize_row(const Codebook& codebook, float absmax, const uint8_t* codes, float* target, int count) {
  for (int i = 0; i < count; ++i) target[i] = codebook.values[codes[i]] * absmax;
}

inline void find_codes(const Codebook& codebook, const float* source, float scale, uint8_t* codes, int count) {
  constexpr int kLanes = 16;  // searches side by side, as each has to wait for its loads
  for (int i = 0; i < count; i += kLanes) {
    const int num_lanes = count - i < kLanes ? count - i : kLanes;
    float values[kLanes] = {};
    for (int lane = 0; lane < num_lanes; ++lane) values[lane] = source[i + lane] * scale;
    int32_t nodes[kLanes];
    for (int32_t& node : nodes) node = 1;
    for (int level = 0; level < 8; ++level) {
      for (int lane = 0; lane < kLanes; ++lane) {
        nodes[lane] = 2 * nodes[lane] + (values[lane] > codebook.tree[nodes[lane]]);
      }
    }
    for (int lane = 0; lane < num_lanes; ++lane) codes[i + lane] = static_cast<uint8_t>(nodes[lane]);  // 256 + code
  }
}

#endif

// Writes the nearest codes and returns the row's absmax. A row with a NaN or an inf decodes to what is not finite.
inline float quantize_row(const Codebook& codebook, const float* source, uint8_t* codes, int count) {
  const float absmax = largest_magnitude(source, count);
  find_codes(codebook, source, inverse_scale(absmax), codes, count);
  return absmax;
}

}  // namespace LMOPT_INSTRUCTION_SET
}  // namespace lmopt
