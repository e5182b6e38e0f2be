// Attention, forward: a block of threads takes some queries of a head and passes over the keys that they see (Dao 2023,
// "FlashAttention-2", https://arxiv.org/abs/2307.08691, algorithm 1).
//
//   for each step of keys:
//     scores  = queries * keys^T
//     weights = exp(scores - the largest so far)
//     output  = output * exp(the largest before - the largest now) + weights * values
//
// Values are copied while the scores are multiplied, the next keys while the output is. In decoding, the few queries of
// all heads that share a key head are the rows of one block, blocks share the keys, and combine.cu joins their outputs.
#pragma once

#include "cuda/attention/dropout.cuh"
#include "cuda/attention/products.cuh"
#include "cuda/attention/scores.cuh"
#include "cuda/attention/seen.cuh"
#include "cuda/attention/shapes.h"

namespace lmopt {
namespace cuda {

template <class T, int kHeadSize, bool kSplitsKeys>
class ForwardBlock {
 public:
  static constexpr ForwardShape kShape = forward_shape(kHeadSize, kGeneration, kSplitsKeys);

  LMOPT_DEVICE ForwardBlock(const DeviceCall& call, const SplitKeys& split, unsigned char* shared)
      : call_(call),
        split_(split),
        queries_{shared},
        keys_{shared + QueryTile::kBytes},
        values_{shared + QueryTile::kBytes + KeyTile::kBytes},
        thread_(threadIdx.x),
        lane_(threadIdx.x % kWarpSize),
        first_row_of_warp_(threadIdx.x / kWarpSize * 16 * kTilesPerWarp) {
    find_place();
    keys_seen_ = call.visibility.keys_seen(batch_, key_head_);
    has_scores_ = needs_scores(call);
    factor_ = exponent_scale(call);
  }

  LMOPT_DEVICE void run() {
    const HeadRows<T> key_rows = rows_of_head<T>(call_.key, batch_, key_head_, call_.head_size);
    const HeadRows<T> value_rows = rows_of_head<T>(call_.value, batch_, key_head_, call_.head_size);
    TileCopy<T, KeyTile, kThreads> copy_keys, copy_values;
    const auto offsets_in = [&](const HeadRows<T>& rows, int step) {
      return offsets_of_keys(rows, keys_seen_, step * kKeys, call_.num_keys);
    };
    load_queries();
    int step = find_step(first_step_);
    if (step < end_step_) copy_keys.begin(keys_, key_rows, thread_, offsets_in(key_rows, step));
    while (step < end_step_) {
      const int next = find_step(step + 1);
      copy_keys.finish(keys_, thread_);
      __syncthreads();
      copy_values.begin(values_, value_rows, thread_, offsets_in(value_rows, step));
      Sums scores[kTilesPerWarp][kKeyTiles];
      multiply_by_rows<T>(scores, queries_, first_row_of_warp_, keys_, lane_);
      copy_values.finish(values_, thread_);
      __syncthreads();
      if (next < end_step_) copy_keys.begin(keys_, key_rows, thread_, offsets_in(key_rows, next));
      turn_into_scores(scores, step * kKeys);
      turn_into_weights(scores);
      if (call_.dropout.threshold != 0) drop_weights(scores, step * kKeys);
      multiply_add_columns<T>(output_, scores, values_, lane_);
      step = next;
    }
    finish();
  }

 private:
  static constexpr int kThreads = kShape.num_threads();
  static constexpr int kTilesPerWarp = kShape.tiles_per_warp;
  static constexpr int kRows = kShape.num_rows();
  static constexpr int kKeys = kShape.num_keys;
  static constexpr int kKeyTiles = kKeys / 8;
  static constexpr int kValueTiles = kHeadSize / 8;
  using QueryTile = Tile<T, kRows, kHeadSize>;
  using KeyTile = Tile<T, kKeys, kHeadSize>;

  // Which rows this block has, and which steps over the keys. Long rows of a causal mask come first.
  LMOPT_DEVICE void find_place() {
    const int group_size = call_.num_heads / call_.num_key_heads;
    const int rows_of_head = kSplitsKeys ? group_size * call_.num_queries : call_.num_queries;
    const int num_heads = kSplitsKeys ? call_.num_key_heads : call_.num_heads;
    const unsigned num_row_blocks = (rows_of_head + kRows - 1) / kRows;
    unsigned block = blockIdx.x;
    first_row_ = static_cast<int>(num_row_blocks - 1 - block % num_row_blocks) * kRows;
    block /= num_row_blocks;
    const int head = static_cast<int>(block % num_heads);
    batch_ = static_cast<int>(block / num_heads);
    first_head_ = kSplitsKeys ? head * group_size : head;
    key_head_ = kSplitsKeys ? head : head / group_size;
    num_rows_ = rows_of_head;
    const int num_steps = (call_.num_keys + kKeys - 1) / kKeys;
    const int steps_of_split = kSplitsKeys ? (num_steps + split_.num_splits - 1) / split_.num_splits : num_steps;
    first_step_ = kSplitsKeys ? static_cast<int>(blockIdx.y) * steps_of_split : 0;
    end_step_ = min(num_steps, first_step_ + steps_of_split);
  }

  // Head and query of a row of this block; query -1 beyond the end.
  struct Place {
    int head, query;
  };

  LMOPT_DEVICE Place place_of(int row) const {
    row += first_row_;
    if (row >= num_rows_) return {first_head_, -1};
    if (!kSplitsKeys) return {first_head_, row};
    return {first_head_ + row / call_.num_queries, row % call_.num_queries};
  }

  // The row in this block of a lane's sums; half 0 or 1 of tile `tile` of its warp.
  LMOPT_DEVICE int row_of(int tile, int half) const {
    return first_row_of_warp_ + 16 * tile + (lane_ >> 2) + 8 * half;
  }

  LMOPT_DEVICE SeenKeys keys_seen_from(const Place& place) const {
    return keys_seen_by(call_.visibility, batch_, place.head, place.query);
  }

  LMOPT_DEVICE void load_queries() {
    TileCopy<T, QueryTile, kThreads> copy;
    const HeadRows<T> rows = rows_of_head<T>(call_.query, batch_, 0, call_.head_size);
    copy.begin(queries_, rows, thread_, [&](int row) -> int64_t {
      const Place place = place_of(row);
      if (place.query < 0 || keys_seen_from(place).is_empty()) return -1;
      return place.head * call_.query.head_stride + rows.offset_of(place.query);
    });
    copy.finish(queries_, thread_);
#pragma unroll
    for (int tile = 0; tile < kTilesPerWarp; ++tile) {
      largest_[tile][0] = largest_[tile][1] = -kInfinity;
      sum_[tile][0] = sum_[tile][1] = 0;
#pragma unroll
      for (int n = 0; n < kValueTiles; ++n) fill_zero(output_[tile][n]);
    }
    __syncthreads();
  }

  LMOPT_DEVICE BlockState state_of_step(int step) const {
    const int first_key = step * kKeys;
    if (!kSplitsKeys) {
      return state_of_tile(
          call_, batch_, first_head_, first_row_, first_row_ + kRows, first_key, first_key + kKeys);
    }
    // Heads that share keys see the same ones, unless each has a mask of its own.
    if (call_.visibility.map.words != nullptr && call_.visibility.map.num_heads > 1) return BlockState::mixed;
    return state_of_tile(call_, batch_, first_head_, 0, call_.num_queries, first_key, first_key + kKeys);
  }

  // The next step, from this one on, whose keys any query of the block sees.
  LMOPT_DEVICE int find_step(int step) const {
    return find_first(step, end_step_, lane_, [&](int i) { return state_of_step(i) != BlockState::empty; });
  }

  LMOPT_DEVICE void turn_into_scores(Sums (&scores)[kTilesPerWarp][kKeyTiles], int first_key) const {
    const bool is_mixed = state_of_step(first_key / kKeys) == BlockState::mixed;
    if (!has_scores_ && !is_mixed) return;
#pragma unroll
    for (int tile = 0; tile < kTilesPerWarp; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Place place = place_of(row_of(tile, half));
        const SeenKeys seen = place.query < 0 ? SeenKeys{0, 0, nullptr, 0} : keys_seen_from(place);
        const int64_t bias = offset_of_bias(call_.bias, batch_, place.head, max(place.query, 0));
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int side = 0; side < 2; ++side) {
            const int key = first_key + 8 * n + column_of_sum(lane_, side);
            float& score = scores[tile][n][2 * half + side];
            if (has_scores_) score = apply_rules<T>(call_, score, bias, key);
            if (is_mixed && !seen.has(key)) score = -kInfinity;
          }
        }
      }
    }
  }

  // Of each row: rescales what was summed up, to the largest score so far.
  LMOPT_DEVICE void turn_into_weights(Sums (&scores)[kTilesPerWarp][kKeyTiles]) {
#pragma unroll
    for (int tile = 0; tile < kTilesPerWarp; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float largest = largest_[tile][half];
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
          largest = fmaxf(largest, fmaxf(scores[tile][n][2 * half], scores[tile][n][2 * half + 1]));
        }
        largest = max_over_row(largest);
        const float origin = origin_of(largest);
        const float shrink = exp2_approximately(
            has_scores_ ? (largest_[tile][half] - origin) * factor_ : exponent_of(largest_[tile][half]) - origin);
        largest_[tile][half] = largest;
        sum_[tile][half] *= shrink;
        // As exponent_above() says, without a branch for each number.
        const float base = has_scores_ ? origin : 0, shift = has_scores_ ? 0 : origin;
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int side = 0; side < 2; ++side) {
            float& score = scores[tile][n][2 * half + side];
            score = exp2_approximately(fmaf(score - base, factor_, -shift));
            sum_[tile][half] += score;
          }
        }
#pragma unroll
        for (int n = 0; n < kValueTiles; ++n) {
          output_[tile][n][2 * half] *= shrink;
          output_[tile][n][2 * half + 1] *= shrink;
        }
      }
    }
  }

  // Rounded, and so the same each time; never a part of a fused multiplication and addition.
  LMOPT_DEVICE float exponent_of(float score) const { return __fmul_rn(score, factor_); }

  // What exponents are counted from, see exponent_above(); where nothing is seen, any number will do.
  LMOPT_DEVICE float origin_of(float largest) const {
    const float origin = has_scores_ ? largest : exponent_of(largest);
    return origin < kLowestScore ? 0 : origin;
  }

  LMOPT_DEVICE void drop_weights(Sums (&weights)[kTilesPerWarp][kKeyTiles], int first_key) const {
    const uint64_t seed = read_seed(call_.dropout);
#pragma unroll
    for (int tile = 0; tile < kTilesPerWarp; ++tile) {
      const Place upper = place_of(row_of(tile, 0)), lower = place_of(row_of(tile, 1));
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        uint32_t words[4];
        draw_words_by_query(
            words, seed, batch_, upper.head, upper.query, lower.head, lower.query, first_key + 8 * n, lane_);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (words[i] < call_.dropout.threshold) weights[tile][n][i] = 0;
        }
      }
    }
  }

  LMOPT_DEVICE void finish() {
    const float kept_scale = call_.dropout.threshold == 0 ? 1 : call_.dropout.kept_scale;
#pragma unroll
    for (int tile = 0; tile < kTilesPerWarp; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Place place = place_of(row_of(tile, half));
        const float sum = sum_over_row(sum_[tile][half]);
        float logsumexp = logsumexp_of(largest_[tile][half], sum), scale = sum == 0 ? 0 : kept_scale / sum;
        if (!kSplitsKeys && call_.sinks != nullptr) {
          const float with_sink = add_exponentials(logsumexp, call_.sinks[place.head]);
          scale = sum == 0 ? 0 : scale * exp2_approximately((logsumexp - with_sink) * kLog2E);
          logsumexp = with_sink;
        }
        store_row(tile, half, place, scale, logsumexp);
      }
    }
    if constexpr (!kSplitsKeys) store_output();
  }

  // From the largest score itself, not from its rounded exponent: large scores would lose digits.
  LMOPT_DEVICE float logsumexp_of(float largest, float sum) const {
    if (sum == 0) return -kInfinity;
    if (has_scores_) return fmaf(log2f(sum), kLn2, largest);
    const float rounded_off = fmaf(largest, factor_, -origin_of(largest));
    return fmaf(largest, call_.scale, (log2f(sum) - rounded_off) * kLn2);
  }

  LMOPT_DEVICE void store_row(int tile, int half, const Place& place, float scale, float logsumexp) {
    const int64_t row = call_.row_of(batch_, place.head, place.query);
    const bool writes_sum = place.query >= 0 && (lane_ & 3) == 0;
    if constexpr (kSplitsKeys) {
      const int64_t row_of_split = blockIdx.y * call_.num_rows() + row;
      if (writes_sum) split_.logsumexp[row_of_split] = logsumexp;
      if (place.query < 0) return;
      float* output = split_.output + row_of_split * call_.head_size;
#pragma unroll
      for (int n = 0; n < kValueTiles; ++n) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const int column = 8 * n + column_of_sum(lane_, side);
          if (column < call_.head_size) output[column] = output_[tile][n][2 * half + side] * scale;
        }
      }
    } else {
      if (writes_sum) call_.logsumexp[row] = logsumexp;
#pragma unroll
      for (int n = 0; n < kValueTiles; ++n) {
        const uint32_t pair = pack<T>(output_[tile][n][2 * half] * scale, output_[tile][n][2 * half + 1] * scale);
        queries_.store_pair(row_of(tile, half), 8 * n + column_of_sum(lane_, 0), pair);
      }
    }
  }

  // A warp's rows of the query tile are read by no other, so they may hold its output.
  LMOPT_DEVICE void store_output() const {
    __syncwarp();
    const HeadRows<T> rows = rows_of_head<T>(call_.output, batch_, first_head_, call_.head_size);
    store_rows(queries_, rows, first_row_of_warp_, 16 * kTilesPerWarp, lane_, [&](int row) -> int64_t {
      const int query = place_of(row).query;
      return query < 0 ? -1 : rows.offset_of(query);
    });
  }

  const DeviceCall& call_;
  const SplitKeys& split_;
  QueryTile queries_;
  KeyTile keys_, values_;
  int thread_, lane_, first_row_of_warp_;
  int batch_, first_head_, key_head_, first_row_, num_rows_, first_step_, end_step_;
  const uint8_t* keys_seen_;
  bool has_scores_;
  float factor_;
  float largest_[kTilesPerWarp][2];  // of each row so far; in the units of sums, see scores.cuh
  float sum_[kTilesPerWarp][2];      // of the weights of this lane
  Sums output_[kTilesPerWarp][kValueTiles];
};

template <class T, int kHeadSize, bool kSplitsKeys>
__global__ void __launch_bounds__(forward_shape(kHeadSize, kGeneration, kSplitsKeys).num_threads(), 1)
    attention_forward_kernel(const DeviceCall call, const SplitKeys split) {
  extern __shared__ __align__(128) unsigned char shared[];
  if constexpr (kHasProducts<T>) ForwardBlock<T, kHeadSize, kSplitsKeys>(call, split, shared).run();
}

}  // namespace cuda
}  // namespace lmopt
