// The rows that a thread block of the fused step works on, in registers as float32, from and to any storage type.
//
// A block of kBlock elements is kRows rows of one element per thread. A row is as long as what shares one maximum in
// an 8-bit state. What lies beyond the end of a tensor is read as 0 and never written.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "optim/fused_step.h"

namespace lmopt {
namespace cuda {

constexpr int kThreads = kQuantizedBlock;
constexpr int kRows = kBlock / kThreads;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffff;

using Row = float[kRows];  // of one thread: its element of each row

struct Position {
  int64_t offset;  // of the block's first element in its tensor
  int count;       // elements in the block, kBlock but for the last

  // The thread's element of a row, counted from the block's first.
  __device__ static int element(int row) { return row * kThreads + static_cast<int>(threadIdx.x); }
  __device__ bool has(int row) const { return element(row) < count; }
};

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline void round_to(float value, float& target) { target = value; }
__device__ inline void round_to(float value, __nv_bfloat16& target) { target = __float2bfloat16_rn(value); }
__device__ inline void round_to(float value, __half& target) { target = __float2half_rn(value); }

template <class Number>
__device__ void load_numbers(const void* data, const Position& at, Row& row) {
  const Number* numbers = static_cast<const Number*>(data) + at.offset;
#pragma unroll
  for (int j = 0; j < kRows; ++j) row[j] = at.has(j) ? to_float(numbers[Position::element(j)]) : 0.0f;
}

template <class Number>
__device__ void store_numbers(void* data, const Position& at, const Row& row) {
  Number* numbers = static_cast<Number*>(data) + at.offset;
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    if (at.has(j)) round_to(row[j], numbers[Position::element(j)]);
  }
}

__device__ inline void load_row(ElementType type, const void* data, const Position& at, Row& row) {
  if (type == ElementType::float32) return load_numbers<float>(data, at, row);
  if (type == ElementType::bfloat16) return load_numbers<__nv_bfloat16>(data, at, row);
  load_numbers<__half>(data, at, row);
}

__device__ inline void store_row(ElementType type, void* data, const Position& at, const Row& row) {
  if (type == ElementType::float32) return store_numbers<float>(data, at, row);
  if (type == ElementType::bfloat16) return store_numbers<__nv_bfloat16>(data, at, row);
  store_numbers<__half>(data, at, row);
}

// ---- 8-bit states ---------------------------------------------------------------------------------------------------

// A codebook in shared memory, with the search tree of optim/codebook.h, and room for a maximum.
struct QuantizedRows {
  float values[256];
  float tree[256];
  int maxima[kRows][kWarps];

  // Readers wait for a barrier.
  __device__ void fill(const float* codebook) {
    const int node = static_cast<int>(threadIdx.x);
    values[node] = codebook[node];
    if (node == 0) return;
    const int first = 1 << (31 - __clz(node)), stride = 256 / first;
    const int right = (node - first) * stride + stride / 2;
    const float left = codebook[right - 1];
    tree[node] = right == 1 && left == 0.0f ? 0.0f : 0.5f * (left + codebook[right]);
  }

  __device__ void load(const uint8_t* codes, const float* absmax, const Position& at, Row& row) const {
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int64_t i = at.offset + Position::element(j);
      row[j] = at.has(j) ? values[codes[i]] * absmax[i / kQuantizedBlock] : 0.0f;
    }
  }

  // As integers, magnitudes have the order of the floats, and a NaN is the largest: it is never lost.
  __device__ void put_maxima_of_warps(const Position& at, const Row& row) {
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      int largest = at.has(j) ? __float_as_int(row[j]) & 0x7fffffff : 0;
      for (int distance = 16; distance > 0; distance /= 2) {
        largest = max(largest, __shfl_xor_sync(kAllLanes, largest, distance));
      }
      if (threadIdx.x % 32 == 0) maxima[j][threadIdx.x / 32] = largest;
    }
  }

  __device__ uint8_t nearest_code(float value) const {
    int node = 1;
#pragma unroll
    for (int level = 0; level < 8; ++level) node = 2 * node + (value > tree[node]);
    return static_cast<uint8_t>(node);  // the low byte of 256 + code
  }

  __device__ void store(uint8_t* codes, float* absmax, const Position& at, const Row& row) {
    put_maxima_of_warps(at, row);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      if (!at.has(j)) continue;
      int largest = 0;
      for (int warp = 0; warp < kWarps; ++warp) largest = max(largest, maxima[j][warp]);
      const int64_t i = at.offset + Position::element(j);
      const float magnitude = __int_as_float(largest);
      // A row of zeros stays one, and so does one whose largest magnitude has no inverse in float32.
      const float scale = magnitude < 0x1p-127f ? 0.0f : 1.0f / magnitude;
      codes[i] = nearest_code(row[j] * scale);
      if (threadIdx.x == 0) absmax[i / kQuantizedBlock] = magnitude;
    }
  }
};

}  // namespace cuda
}  // namespace lmopt
