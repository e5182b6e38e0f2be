// The tiles that each kernel works on, by head size and generation: the one table that host and device read.
//
// A head size is filled up with zeros, in shared memory alone, to the next of kHeadSizes. The bounds are 64 KB of shared
// memory on Turing and 99 KB on all others (sm_86, 89 and 120 have no more), and 255 registers a thread, without spills:
//
//   forward    sums of the output: rows x D; of the scores: rows x keys, of which a warp of two tiles of 16 rows reads
//              each right factor once for both
//   backward   the outer rows (keys, whose gradients are summed up, or queries) stay, the inner ones pass by
#pragma once

namespace lmopt {
namespace cuda {

// Of the code, not of the card: newer cards may run older code.
enum class Generation { turing, ampere, blackwell };  // Hopper runs as Ampere does

constexpr Generation generation_of(int architecture) {  // 75 for sm_75
  return architecture < 80 ? Generation::turing : architecture < 100 ? Generation::ampere : Generation::blackwell;
}

constexpr int kHeadSizes[] = {32, 64, 96, 128, 256};

struct ForwardShape {
  int num_warps;
  int tiles_per_warp;  // of 16 queries
  int num_keys;        // of a step

  constexpr int num_threads() const { return 32 * num_warps; }
  constexpr int num_rows() const { return 16 * tiles_per_warp * num_warps; }
  constexpr int shared_bytes(int head_size) const { return 2 * head_size * (num_rows() + 2 * num_keys); }
};

// Of up to 16 queries, whose heads lie beside each other in the rows; the keys are split among blocks.
constexpr int kMaxQueriesOfDecoding = 16;

constexpr ForwardShape forward_shape(int head_size, Generation generation, bool splits_keys) {
  const bool is_turing = generation == Generation::turing;
  if (splits_keys && is_turing) return {1, 1, head_size > 64 ? 16 : 32};
  if (splits_keys) return {1, 1, head_size > 128 ? 32 : 64};
  if (head_size > 128) return {4, 1, is_turing ? 16 : 32};
  if (is_turing) return head_size > 64 ? ForwardShape{8, 1, 32} : ForwardShape{4, 2, 32};
  return {4, 2, head_size > 64 ? 32 : 64};
}

// Which gradients a kernel sums up: those of the outer rows.
enum class GradientOf { query, key, value, key_and_value };

struct BackwardShape {
  int num_warps;
  int tiles_per_warp;  // of 16 outer rows
  int num_inner_rows;
  int num_stages;  // inner tiles in shared memory

  constexpr int num_threads() const { return 32 * num_warps; }
  constexpr int num_outer_rows() const { return 16 * tiles_per_warp * num_warps; }
  constexpr int shared_bytes(int head_size) const {
    // Of an inner query also its logsumexp and delta.
    return 4 * head_size * (num_outer_rows() + num_stages * num_inner_rows) + num_stages * num_inner_rows * 8;
  }
};

constexpr BackwardShape backward_shape(GradientOf of, int head_size, Generation generation) {
  if (generation == Generation::turing) {
    if (head_size > 128) return {2, 1, 16, 1};
    return {4, 1, 32, 1};
  }
  if (head_size > 128) return {4, 1, 32, 1};
  // Two tiles a warp, wherever the registers allow it: shared memory is read half as often.
  if (of == GradientOf::query && head_size <= 64) return {4, 2, 32, 2};
  if (of == GradientOf::query && head_size > 96) return {4, 2, 16, 2};
  if (head_size > 64) return {4, 1, 32, 2};
  return generation == Generation::blackwell ? BackwardShape{4, 1, 64, 2} : BackwardShape{4, 2, 16, 2};
}

// One pair of tiles of queries and of keys.
constexpr BackwardShape bias_gradient_shape(int head_size, Generation generation) {
  if (generation == Generation::turing) return {head_size > 128 ? 2 : 4, 1, head_size > 96 ? 16 : 32, 1};
  return {4, 1, head_size > 64 ? 32 : 64, 1};
}

// Above some head size the registers hold the sums of one gradient: key and value take a launch each. The compiler
// needs a few registers more for the newest.
constexpr bool separates_key_and_value(int head_size, Generation generation) {
  return head_size > (generation == Generation::ampere ? 128 : 96);
}

constexpr bool uses_gradient_kernel(GradientOf of, int head_size, Generation generation) {
  return of == GradientOf::query ||
      (of == GradientOf::key_and_value) != separates_key_and_value(head_size, generation);
}

}  // namespace cuda
}  // namespace lmopt
