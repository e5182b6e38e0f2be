// Rows of query, key, value or gradient in shared memory, and the way there and back.
//
// A row lies in chunks of 16 bytes, which are swapped within 128 bytes by the row's number: eight lanes that read the
// same chunk of eight rows, or eight chunks of one row, meet each bank of shared memory once.
#pragma once

#include "cuda/attention/call.h"
#include "cuda/attention/primitives.cuh"

namespace lmopt {
namespace cuda {

constexpr int kChunk = 8;  // numbers of 16 bits in 16 bytes

// The rows of one head, or of one batch entry, in global memory.
template <class T>
struct HeadRows {
  T* data;
  int64_t row_stride;
  int head_size;
  bool is_aligned;  // whether each row begins at a multiple of 16 bytes, and ends there

  // Where a row lies, from `data` on.
  LMOPT_DEVICE int64_t offset_of(int64_t row) const { return row * row_stride; }

  // Numbers of a chunk that exist.
  LMOPT_DEVICE int size_of_chunk(int chunk) const {
    const int left = head_size - chunk * kChunk;
    return left < 0 ? 0 : left < kChunk ? left : kChunk;
  }

  LMOPT_DEVICE uint4 load(int64_t offset, int index) const {
    const int size = size_of_chunk(index);
    uint4 numbers = make_uint4(0, 0, 0, 0);
    if (size == 0) return numbers;
    const T* from = data + offset + index * kChunk;
    if (is_aligned) return *reinterpret_cast<const uint4*>(from);
    const auto* bits = reinterpret_cast<const uint16_t*>(from);
    auto* words = reinterpret_cast<uint32_t*>(&numbers);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i < size) words[i / 2] |= static_cast<uint32_t>(bits[i]) << (16 * (i % 2));
    }
    return numbers;
  }

  LMOPT_DEVICE void store(int64_t offset, int index, const uint4& numbers) const {
    const int size = size_of_chunk(index);
    T* to = data + offset + index * kChunk;
    if (is_aligned) {
      if (size > 0) *reinterpret_cast<uint4*>(to) = numbers;
      return;
    }
    auto* bits = reinterpret_cast<uint16_t*>(to);
    const auto* words = reinterpret_cast<const uint32_t*>(&numbers);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i < size) bits[i] = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
    }
  }
};

template <class T>
LMOPT_DEVICE HeadRows<T> rows_of_head(const DeviceTensor& tensor, int64_t batch, int64_t head, int head_size) {
  T* data = static_cast<T*>(tensor.data) + batch * tensor.batch_stride + head * tensor.head_stride;
  return {data, tensor.row_stride, head_size, tensor.is_aligned};
}

template <class T, int kRows, int kHeadSize>
struct Tile {
  static constexpr int kNumRows = kRows;
  static constexpr int kChunksPerRow = kHeadSize / kChunk;
  static constexpr int kBytes = kRows * kHeadSize * 2;
  static_assert(kHeadSize % 32 == 0, "the swaps need rows of 64 bytes, or a multiple of it");

  unsigned char* data;

  LMOPT_DEVICE unsigned char* chunk(int row, int index) const {
    const int swap = kChunksPerRow % 8 == 0 ? row & 7 : (row >> 1) & 3;
    return data + (row * kChunksPerRow + (index ^ swap)) * 16;
  }

  // The rows from `row` to `row + 15` and the columns from 16 `step` on as a left factor.
  LMOPT_DEVICE void load_left(LeftFactor& factor, int row, int step, int lane) const {
    load_matrices(factor, chunk(row + (lane & 15), 2 * step + (lane >> 4)));
  }

  // For a product with the transposed tile: 16 rows from `row` on become columns, 16 columns are summed over.
  LMOPT_DEVICE void load_right_of_rows(RightFactors& factors, int row, int step, int lane) const {
    load_matrices(factors, chunk(row + ((lane >> 4) << 3) + (lane & 7), 2 * step + ((lane >> 3) & 1)));
  }

  // For a product with the tile: 16 rows from `row` on are summed over, 16 columns from 8 `column_chunk` on stay.
  LMOPT_DEVICE void load_right_of_columns(RightFactors& factors, int row, int column_chunk, int lane) const {
    load_transposed_matrices(factors, chunk(row + (lane & 15), column_chunk + (lane >> 4)));
  }

  // Two numbers of a lane's sums; a warp that has stored its rows may read them after __syncwarp.
  LMOPT_DEVICE void store_pair(int row, int column, uint32_t pair) const {
    *reinterpret_cast<uint32_t*>(chunk(row, column / kChunk) + (column % kChunk) * 2) = pair;
  }
};

// Copies rows of global memory into a tile while the threads do something else. The tile must be free from begin() on,
// and is filled after finish() and a barrier. Turing holds the numbers in registers in between, if they are few.
template <class T, class AnyTile, int kThreads>
class TileCopy {
 public:
  // find_offset(i) tells where what row i of the tile gets lies, from rows.data on, or -1: then it gets zeros.
  template <class FindOffset>
  LMOPT_DEVICE void begin(const AnyTile& tile, const HeadRows<T>& rows, int thread, const FindOffset& find_offset) {
    if (!rows.is_aligned) return copy_now(tile, rows, thread, find_offset);
    for_each_row(thread, [&](int pass, int row, int first_chunk) {
      const int64_t offset = find_offset(row);
#pragma unroll
      for (int i = 0; i < kChunksPerLane; ++i) {
        const int chunk = first_chunk + i * kLanesPerRow;
        const bool exists = offset >= 0 && chunk * kChunk < rows.head_size;
        const T* from = exists ? rows.data + offset + chunk * kChunk : rows.data;
        if constexpr (!kIsTuring) {
          copy_async(tile.chunk(row, chunk), from, exists ? 16 : 0);
        } else {
          const uint4 numbers = exists ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
          hold_or_store(tile, pass * kChunksPerLane + i, row, chunk, numbers);
        }
      }
    });
    is_held_ = kIsHeld;
  }

  LMOPT_DEVICE void finish(const AnyTile& tile, int thread) {
    wait_for_copies();
    if (!kIsHeld || !is_held_) return;
    for_each_row(thread, [&](int pass, int row, int first_chunk) {
#pragma unroll
      for (int i = 0; i < kChunksPerLane; ++i) {
        *reinterpret_cast<uint4*>(tile.chunk(row, first_chunk + i * kLanesPerRow)) =
            held_[kIsHeld ? pass * kChunksPerLane + i : 0];
      }
    });
  }

 private:
  static constexpr int kLanesPerRow = AnyTile::kChunksPerRow % 8 == 0 ? 8 : 4;  // which read 128 bytes, or 64
  static constexpr int kChunksPerLane = AnyTile::kChunksPerRow / kLanesPerRow;
  static constexpr int kRowsPerPass = kThreads / kLanesPerRow;
  static constexpr int kPasses = (AnyTile::kNumRows + kRowsPerPass - 1) / kRowsPerPass;
  // Else some threads have no row in the last pass: in tiles of 96 columns with few rows.
  static constexpr bool kIsEven = AnyTile::kNumRows % kRowsPerPass == 0;
  // Beside the sums of the largest heads there are no registers left.
  static constexpr bool kIsHeld = kIsTuring && kPasses * kChunksPerLane <= 8 && AnyTile::kChunksPerRow <= 16;

  template <class CopyRow>
  LMOPT_DEVICE static void for_each_row(int thread, const CopyRow& copy_row) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = thread / kLanesPerRow + pass * kRowsPerPass;
      if (kIsEven || row < AnyTile::kNumRows) copy_row(pass, row, thread % kLanesPerRow);
    }
  }

  LMOPT_DEVICE void hold_or_store(const AnyTile& tile, int i, int row, int chunk, const uint4& numbers) {
    if constexpr (kIsHeld) {
      held_[i] = numbers;
    } else {
      *reinterpret_cast<uint4*>(tile.chunk(row, chunk)) = numbers;
    }
  }

  template <class FindOffset>
  LMOPT_DEVICE void copy_now(const AnyTile& tile, const HeadRows<T>& rows, int thread, const FindOffset& find_offset) {
#pragma unroll 1
    for (int index = thread; index < AnyTile::kNumRows * AnyTile::kChunksPerRow; index += kThreads) {
      const int row = index / AnyTile::kChunksPerRow, chunk = index % AnyTile::kChunksPerRow;
      const int64_t offset = find_offset(row);
      const uint4 numbers = offset < 0 ? make_uint4(0, 0, 0, 0) : rows.load(offset, chunk);
      *reinterpret_cast<uint4*>(tile.chunk(row, chunk)) = numbers;
    }
    is_held_ = false;
  }

  uint4 held_[kIsHeld ? kPasses * kChunksPerLane : 1];
  bool is_held_ = false;
};

// Rows of a tile that a warp has stored itself, to global memory, 16 bytes at a time.
template <class T, class AnyTile, class FindOffset>
LMOPT_DEVICE void store_rows(
    const AnyTile& tile, const HeadRows<T>& rows, int first_row, int num_rows, int lane,
    const FindOffset& find_offset) {
  for (int index = lane; index < num_rows * AnyTile::kChunksPerRow; index += kWarpSize) {
    const int row_of_tile = first_row + index / AnyTile::kChunksPerRow, chunk = index % AnyTile::kChunksPerRow;
    const int64_t offset = find_offset(row_of_tile);
    if (offset < 0) continue;
    rows.store(offset, chunk, *reinterpret_cast<const uint4*>(tile.chunk(row_of_tile, chunk)));
  }
}

}  // namespace cuda
}  // namespace lmopt
