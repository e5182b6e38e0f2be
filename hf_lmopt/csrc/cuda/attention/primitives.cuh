// The instructions of the tensor cores and of asynchronous copies, and where they hold the numbers of a tile.
//
// All else in this folder is written in these words; no other file has inline PTX. Two generations differ here:
//
//                    Turing (sm_75)              Ampere and newer (sm_80 code)
//   products         float16, 16 x 8 x 8         float16 and bfloat16, 16 x 8 x 16
//   global to shared through registers           cp.async
//
// A product of 16 x 8 leaves each of the 32 lanes four sums: the rows lane / 4 and lane / 4 + 8, the columns
// 2 (lane mod 4) and the next.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/attention/shapes.h"

#define LMOPT_DEVICE __device__ __forceinline__

namespace lmopt {
namespace cuda {

#if defined(__CUDA_ARCH__)
constexpr Generation kGeneration = generation_of(__CUDA_ARCH__ / 10);
#else
constexpr Generation kGeneration = Generation::ampere;  // for host code, which compiles no body
#endif
constexpr bool kIsTuring = kGeneration == Generation::turing;

using Half = __half;
using BFloat16 = __nv_bfloat16;

// Whether the tensor cores of the architecture that is compiled for know the type.
template <class T>
constexpr bool kHasProducts = !kIsTuring;
template <>
constexpr bool kHasProducts<Half> = true;

template <class T>
constexpr bool kIsHalf = false;
template <>
constexpr bool kIsHalf<Half> = true;

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_huge_valf();

// Four sums of a lane for one tile of 16 x 8.
using Sums = float[4];
// A lane's part of a left factor, 16 x 16: two numbers in each register.
using LeftFactor = uint32_t[4];
// A lane's part of two right factors side by side, each 16 x 8: registers 0 and 1, 2 and 3.
using RightFactors = uint32_t[4];

// The row, or the column, within its tile of 16 x 8, of a lane's sum `element`.
LMOPT_DEVICE int row_of_sum(int lane, int element) { return (lane >> 2) + 8 * (element >> 1); }
LMOPT_DEVICE int column_of_sum(int lane, int element) { return 2 * (lane & 3) + (element & 1); }

// The number itself, of which the compiler forgets where it comes from: what is computed from it in a loop is not held
// in registers through the loop.
LMOPT_DEVICE int forget_origin(int number) {
  asm volatile("" : "+r"(number));
  return number;
}

LMOPT_DEVICE void fill_zero(Sums& sums) {
  sums[0] = sums[1] = sums[2] = sums[3] = 0;
}

LMOPT_DEVICE uint32_t pack(Half, float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

LMOPT_DEVICE uint32_t pack(BFloat16, float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Two numbers, rounded to nearest, the first one in the lower half.
template <class T>
LMOPT_DEVICE uint32_t pack(float low, float high) {
  return pack(T{}, low, high);
}

LMOPT_DEVICE float to_float(Half number) { return __half2float(number); }
LMOPT_DEVICE float to_float(BFloat16 number) { return __bfloat162float(number); }
LMOPT_DEVICE float to_float(float number) { return number; }

// sums += left * right, over 16 of the dimension that is summed over.
template <class T>
LMOPT_DEVICE void multiply_add(Sums& sums, const LeftFactor& left, uint32_t right0, uint32_t right1) {
  static_assert(kHasProducts<T>, "Turing multiplies float16 alone");
  if constexpr (kIsTuring) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(right0));
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[2]), "r"(left[3]), "r"(right1));
  } else if constexpr (kIsHalf<T>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
  }
}

// The sums of two neighbouring tiles of 16 x 8 as a left factor of 16 x 16: each lane has its numbers already.
template <class T>
LMOPT_DEVICE void convert_to_left_factor(LeftFactor& left, const Sums& first, const Sums& second) {
  left[0] = pack<T>(first[0], first[1]);
  left[1] = pack<T>(first[2], first[3]);
  left[2] = pack<T>(second[0], second[1]);
  left[3] = pack<T>(second[2], second[3]);
}

LMOPT_DEVICE uint32_t address_in_shared(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four matrices of 8 x 8; lanes 8 i to 8 i + 7 give the addresses of the rows of matrix i. Lane l gets the numbers
// 2 (l mod 4) and the next of row l / 4.
LMOPT_DEVICE void load_matrices(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(address_in_shared(row))
               : "memory");
}

// The same of the transposed matrices.
LMOPT_DEVICE void load_transposed_matrices(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(address_in_shared(row))
               : "memory");
}

// Starts to copy 16 bytes, of which those from `num_bytes` on become 0.
LMOPT_DEVICE void copy_async(void* to_shared, const void* from_global, int num_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(address_in_shared(to_shared)), "l"(from_global), "r"(num_bytes)
               : "memory");
}

// Waits for all copies that this thread has started; others see them after the next barrier.
LMOPT_DEVICE void wait_for_copies() {
  if constexpr (!kIsTuring) asm volatile("cp.async.wait_all;" ::: "memory");
}

// 2^x, with a relative error below 2^-22.
LMOPT_DEVICE float exp2_approximately(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// log(exp(a) + exp(b)), -inf if both are.
LMOPT_DEVICE float add_exponentials(float a, float b) {
  const float larger = a < b ? b : a, smaller = a < b ? a : b;  // a NaN stays the larger or the smaller one
  if (larger == -kInfinity) return larger;
  return larger + log2f(1 + exp2_approximately((smaller - larger) * kLog2E)) * kLn2;
}

// The first number from `first` to before `end` for which is_wanted() is true, else `end`. All lanes ask together, 32
// numbers at a time.
template <class IsWanted>
LMOPT_DEVICE int find_first(int first, int end, int lane, const IsWanted& is_wanted) {
  for (; first < end; first += kWarpSize) {
    const bool is_found = first + lane < end && is_wanted(first + lane);
    const unsigned found = __ballot_sync(kAllLanes, is_found);
    if (found != 0) return first + __ffs(found) - 1;
  }
  return end;
}

// Over the four lanes that hold a row.
LMOPT_DEVICE float max_over_row(float value) {
  value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, 1));
  return fmaxf(value, __shfl_xor_sync(kAllLanes, value, 2));
}

LMOPT_DEVICE float sum_over_row(float value) {
  value += __shfl_xor_sync(kAllLanes, value, 1);
  return value + __shfl_xor_sync(kAllLanes, value, 2);
}

}  // namespace cuda
}  // namespace lmopt
