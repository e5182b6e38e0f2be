// Multiply-adds in registers alone: the rate that no kernel on this core can pass. bench_attention.py builds and calls it.
#include <immintrin.h>

#include <cstdint>

constexpr int kSums = 24;  // enough to hide the latency

// Returns the floating-point operations that were done.
extern "C" double multiply_add_float32(int64_t rounds) {
#if defined(__AVX512F__)
  __m512 sums[kSums];
  for (__m512& sum : sums) sum = _mm512_set1_ps(1e-3f);
  const __m512 a = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(0.25f);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 24
    for (int k = 0; k < kSums; ++k) sums[k] = _mm512_fmadd_ps(a, b, sums[k]);
  }
  volatile float keep = 0;
  for (const __m512& sum : sums) keep = keep + _mm512_reduce_add_ps(sum);
  return 2.0 * 16 * kSums * static_cast<double>(rounds);
#else
  constexpr int kFewSums = 12;
  __m256 sums[kFewSums];
  for (__m256& sum : sums) sum = _mm256_set1_ps(1e-3f);
  const __m256 a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(0.25f);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int k = 0; k < kFewSums; ++k) sums[k] = _mm256_fmadd_ps(a, b, sums[k]);
  }
  volatile float keep = 0;
  for (const __m256& sum : sums) keep = keep + _mm256_cvtss_f32(sum);
  return 2.0 * 8 * kFewSums * static_cast<double>(rounds);
#endif
}

#if defined(__AVX512BF16__)
extern "C" double multiply_add_bfloat16(int64_t rounds) {
  __m512 sums[kSums];
  for (__m512& sum : sums) sum = _mm512_set1_ps(1e-3f);
  const __m512bh a = (__m512bh)_mm512_set1_epi32(0x3f003f00), b = (__m512bh)_mm512_set1_epi32(0x3e803e80);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 24
    for (int k = 0; k < kSums; ++k) sums[k] = _mm512_dpbf16_ps(sums[k], a, b);
  }
  volatile float keep = 0;
  for (const __m512& sum : sums) keep = keep + _mm512_reduce_add_ps(sum);
  return 4.0 * 16 * kSums * static_cast<double>(rounds);
}
#endif
