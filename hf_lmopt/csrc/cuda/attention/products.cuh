// Products of whole tiles in shared memory: what the kernels of the backward pass are made of.
#pragma once

#include "cuda/attention/tile.cuh"

namespace lmopt {
namespace cuda {

// sums = left * right^T, for the rows of `left` from first_row on.
template <class T, int kTiles, int kColumnTiles, class LeftTile, class RightTile>
LMOPT_DEVICE void multiply_by_rows(
    Sums (&sums)[kTiles][kColumnTiles], const LeftTile& left, int first_row, const RightTile& right, int lane) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) fill_zero(sums[tile][n]);
  }
#pragma unroll
  for (int k = 0; k < LeftTile::kChunksPerRow / 2; ++k) {
    LeftFactor factor[kTiles];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) left.load_left(factor[tile], first_row + 16 * tile, k, lane);
#pragma unroll
    for (int n = 0; n < kColumnTiles; n += 2) {
      RightFactors factors;
      right.load_right_of_rows(factors, 8 * n, k, lane);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        multiply_add<T>(sums[tile][n], factor[tile], factors[0], factors[1]);
        multiply_add<T>(sums[tile][n + 1], factor[tile], factors[2], factors[3]);
      }
    }
  }
}

// sums += left * right, where `left` are sums themselves, rounded, one column for each row of `right`.
template <class T, int kTiles, int kLeftTiles, int kColumnTiles, class RightTile>
LMOPT_DEVICE void multiply_add_columns(
    Sums (&sums)[kTiles][kColumnTiles], const Sums (&left)[kTiles][kLeftTiles], const RightTile& right, int lane) {
#pragma unroll
  for (int k = 0; k < kLeftTiles / 2; ++k) {
    LeftFactor factor[kTiles];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      convert_to_left_factor<T>(factor[tile], left[tile][2 * k], left[tile][2 * k + 1]);
    }
#pragma unroll
    for (int n = 0; n < kColumnTiles; n += 2) {
      RightFactors factors;
      right.load_right_of_columns(factors, 16 * k, n, lane);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        multiply_add<T>(sums[tile][n], factor[tile], factors[0], factors[1]);
        multiply_add<T>(sums[tile][n + 1], factor[tile], factors[2], factors[3]);
      }
    }
  }
}

}  // namespace cuda
}  // namespace lmopt
