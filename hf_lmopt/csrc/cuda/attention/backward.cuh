// The gradients of attention. A block of threads takes some rows, the outer ones, whose gradients it sums up in
// registers, and passes over the inner ones; no sum is shared, so the order of additions is always the same.
//
//                              outer rows (first, second)     inner rows (first, second)
//   gradient of key and value  keys, values                   queries, output gradients
//   gradient of query          queries, output gradients      keys, values
//
//   scores           = first outer * first inner^T
//   weight gradients = second outer * second inner^T
//   first gradient  += score gradients * first inner           of key or query
//   second gradient += weights * second inner                  of value
//
// With keys as rows all that is the transposed, and the products need no other form.
#pragma once

#include "cuda/attention/products.cuh"
#include "cuda/attention/score_gradients.cuh"
#include "cuda/attention/shapes.h"

namespace lmopt {
namespace cuda {

template <class T, int kHeadSize, GradientOf kOf>
class BackwardBlock {
 public:
  LMOPT_DEVICE BackwardBlock(const DeviceCall& call, const DeviceGradients& gradients, unsigned char* shared)
      : call_(call),
        gradients_(gradients),
        outer_first_{shared},
        outer_second_{shared + OuterTile::kBytes},
        inner_(shared + 2 * OuterTile::kBytes),
        thread_(threadIdx.x),
        lane_(threadIdx.x % kWarpSize),
        first_row_of_warp_(threadIdx.x / kWarpSize * 16 * kTilesPerWarp) {
    find_place();
    keys_seen_ = call.visibility.keys_seen(batch_, key_head_);
  }

  LMOPT_DEVICE void run() {
    load_outer();
    int stage = 0, step = find_step(0);
    if (step < num_steps_) begin_inner(step, stage);
    while (step < num_steps_) {
      const int next = find_step(step + 1);
      copy_first_.finish(inner_first(stage), thread_);
      copy_second_.finish(inner_second(stage), thread_);
      __syncthreads();
      if (kStages == 2 && next < num_steps_) begin_inner(next, 1 - stage);
      add_gradients_of(step, stage);
      if (kStages == 1) {
        __syncthreads();
        if (next < num_steps_) begin_inner(next, stage);
      }
      step = next;
      stage = kStages - 1 - stage;
    }
    store();
  }

 private:
  static constexpr BackwardShape kShape = backward_shape(kOf, kHeadSize, kGeneration);
  static constexpr bool kRowsAreKeys = kOf != GradientOf::query;
  static constexpr bool kHasFirst = kOf != GradientOf::value;
  static constexpr bool kHasSecond = kOf == GradientOf::value || kOf == GradientOf::key_and_value;
  static constexpr int kThreads = kShape.num_threads();
  static constexpr int kTilesPerWarp = kShape.tiles_per_warp;
  static constexpr int kOuterRows = kShape.num_outer_rows();
  static constexpr int kInnerRows = kShape.num_inner_rows;
  static constexpr int kStages = kShape.num_stages;
  static constexpr int kInnerTiles = kInnerRows / 8;
  static constexpr int kColumnTiles = kHeadSize / 8;
  using OuterTile = Tile<T, kOuterRows, kHeadSize>;
  using InnerTile = Tile<T, kInnerRows, kHeadSize>;
  static constexpr int kStageBytes = 2 * InnerTile::kBytes + kInnerRows * static_cast<int>(sizeof(QueryFacts));

  LMOPT_DEVICE InnerTile inner_first(int stage) const { return {inner_ + stage * kStageBytes}; }
  LMOPT_DEVICE InnerTile inner_second(int stage) const { return {inner_ + stage * kStageBytes + InnerTile::kBytes}; }
  LMOPT_DEVICE QueryFacts* inner_facts(int stage) const {
    return reinterpret_cast<QueryFacts*>(inner_ + stage * kStageBytes + 2 * InnerTile::kBytes);
  }

  LMOPT_DEVICE void find_place() {
    const int num_rows = kRowsAreKeys ? call_.num_keys : call_.num_queries;
    const int num_heads = kRowsAreKeys ? call_.num_key_heads : call_.num_heads;
    const int group_size = call_.num_heads / call_.num_key_heads;
    const unsigned num_row_blocks = (num_rows + kOuterRows - 1) / kOuterRows;
    unsigned block = blockIdx.x;
    // The longest rows of a causal mask come first.
    const unsigned row_block = block % num_row_blocks;
    first_outer_ = static_cast<int>(kRowsAreKeys ? row_block : num_row_blocks - 1 - row_block) * kOuterRows;
    block /= num_row_blocks;
    const int head = static_cast<int>(block % num_heads);
    batch_ = static_cast<int>(block / num_heads);
    key_head_ = kRowsAreKeys ? head : head / group_size;
    first_head_ = kRowsAreKeys ? head * group_size : head;
    const int num_inner = kRowsAreKeys ? call_.num_queries : call_.num_keys;
    blocks_of_inner_ = (num_inner + kInnerRows - 1) / kInnerRows;
    num_steps_ = kRowsAreKeys ? group_size * blocks_of_inner_ : blocks_of_inner_;
  }

  // With keys as rows, the steps pass over the queries of all heads that share them.
  LMOPT_DEVICE int head_of(int step) const {
    return kRowsAreKeys ? first_head_ + step / blocks_of_inner_ : first_head_;
  }
  LMOPT_DEVICE int first_inner_of(int step) const {
    return (kRowsAreKeys ? step % blocks_of_inner_ : step) * kInnerRows;
  }

  LMOPT_DEVICE BlockState state_of_step(int step) const {
    const int head = head_of(step), inner = first_inner_of(step);
    if constexpr (kRowsAreKeys) {
      return state_of_tile(
          call_, batch_, head, inner, inner + kInnerRows, first_outer_, first_outer_ + kOuterRows);
    } else {
      return state_of_tile(
          call_, batch_, head, first_outer_, first_outer_ + kOuterRows, inner, inner + kInnerRows);
    }
  }

  LMOPT_DEVICE int find_step(int step) const {
    return find_first(step, num_steps_, lane_, [&](int i) { return state_of_step(i) != BlockState::empty; });
  }

  // Rows of key or value, of those that are seen.
  template <class Copy, class AnyTile>
  LMOPT_DEVICE void begin_keys(Copy& copy, const AnyTile& tile, const DeviceTensor& tensor, int first_key) const {
    const HeadRows<T> rows = rows_of_head<T>(tensor, forget_origin(batch_), key_head_, call_.head_size);
    copy.begin(tile, rows, thread_, offsets_of_keys(rows, keys_seen_, first_key, call_.num_keys));
  }

  // Rows of query or output gradient, of those that see anything.
  template <class Copy, class AnyTile>
  LMOPT_DEVICE void begin_queries(
      Copy& copy, const AnyTile& tile, const DeviceTensor& tensor, int head, int first_query) const {
    const int batch = forget_origin(batch_);
    const HeadRows<T> rows = rows_of_head<T>(tensor, batch, head, call_.head_size);
    copy.begin(tile, rows, thread_, offsets_of_queries(rows, call_, batch, head, first_query));
  }

  LMOPT_DEVICE void load_outer() {
    TileCopy<T, OuterTile, kThreads> copy;
    if constexpr (kRowsAreKeys) {
      begin_keys(copy, outer_first_, call_.key, first_outer_);
    } else {
      begin_queries(copy, outer_first_, call_.query, first_head_, first_outer_);
    }
    copy.finish(outer_first_, thread_);
    if constexpr (kRowsAreKeys && kHasFirst) {
      begin_keys(copy, outer_second_, call_.value, first_outer_);
    } else if constexpr (!kRowsAreKeys) {
      begin_queries(copy, outer_second_, gradients_.output_gradient, first_head_, first_outer_);
    }
    if constexpr (kHasFirst) copy.finish(outer_second_, thread_);
#pragma unroll
    for (int tile = 0; tile < kTilesPerWarp; ++tile) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        if constexpr (kHasFirst) fill_zero(first_gradient_[tile][n]);
        if constexpr (kHasSecond) fill_zero(second_gradient_[tile][n]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if constexpr (!kRowsAreKeys) {
          outer_facts_[tile][half] =
              load_facts(call_, gradients_, batch_, first_head_, first_outer_ + row_of(tile, half));
        }
      }
    }
    __syncthreads();
  }

  LMOPT_DEVICE void begin_inner(int step, int stage) {
    const int head = head_of(step), inner = first_inner_of(step);
    if constexpr (kRowsAreKeys) {
      begin_queries(copy_first_, inner_first(stage), call_.query, head, inner);
      begin_queries(copy_second_, inner_second(stage), gradients_.output_gradient, head, inner);
      if (thread_ < kInnerRows) {
        inner_facts(stage)[thread_] = load_facts(call_, gradients_, batch_, head, inner + thread_);
      }
    } else {
      begin_keys(copy_first_, inner_first(stage), call_.key, inner);
      begin_keys(copy_second_, inner_second(stage), call_.value, inner);
    }
  }

  LMOPT_DEVICE int row_of(int tile, int half) const {
    return first_row_of_warp_ + 16 * tile + row_of_sum(lane_, 2 * half);
  }

  // Calls turn(tile, n, facts) for each of a lane's sums of 16 x 8, with the facts of its two queries.
  template <class Turn>
  LMOPT_DEVICE void for_each_tile(int stage, const Turn& turn) const {
#pragma unroll
    for (int tile = 0; tile < kTilesPerWarp; ++tile) {
#pragma unroll
      for (int n = 0; n < kInnerTiles; ++n) {
        QueryFacts facts[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if constexpr (kRowsAreKeys) {
            facts[i] = inner_facts(stage)[8 * n + column_of_sum(lane_, i)];
          } else {
            facts[i] = outer_facts_[tile][i];
          }
        }
        turn(tile, n, facts);
      }
    }
  }

  LMOPT_DEVICE void add_gradients_of(int step, int stage) {
    Sums weights[kTilesPerWarp][kInnerTiles], score_gradients[kTilesPerWarp][kInnerTiles];
    multiply_by_rows<T>(weights, outer_first_, first_row_of_warp_, inner_first(stage), lane_);
    if constexpr (kHasFirst) {
      multiply_by_rows<T>(score_gradients, outer_second_, first_row_of_warp_, inner_second(stage), lane_);
    }
    const bool is_mixed = state_of_step(step) == BlockState::mixed;
    const ScoreGradients<T, kRowsAreKeys> scores{call_, forget_origin(batch_), head_of(step), is_mixed, lane_};
    if (scores.is_plain()) {
      for_each_tile(stage, [&](int tile, int n, const QueryFacts(&facts)[2]) {
        scores.turn_plainly(weights[tile][n], score_gradients[tile][n], facts);
      });
    } else {
      for_each_tile(stage, [&](int tile, int n, const QueryFacts(&facts)[2]) {
        const int row = first_outer_ + first_row_of_warp_ + 16 * tile, column = first_inner_of(step) + 8 * n;
        scores.turn(
            weights[tile][n], score_gradients[tile][n], kRowsAreKeys ? column : row, kRowsAreKeys ? row : column,
            facts);
      });
    }
    if constexpr (kHasSecond) multiply_add_columns<T>(second_gradient_, weights, inner_second(stage), lane_);
    if constexpr (kHasFirst) multiply_add_columns<T>(first_gradient_, score_gradients, inner_first(stage), lane_);
  }

  LMOPT_DEVICE void store() const {
    const float kept_scale = call_.dropout.threshold == 0 ? 1 : call_.dropout.kept_scale;
    if constexpr (kHasFirst) {
      store(first_gradient_, call_.scale, outer_first_, kRowsAreKeys ? gradients_.key : gradients_.query);
    }
    if constexpr (kHasSecond) store(second_gradient_, kept_scale, outer_second_, gradients_.value);
  }

  // By way of the warp's own rows of a tile, which no other warp reads.
  LMOPT_DEVICE void store(
      const Sums (&sums)[kTilesPerWarp][kColumnTiles], float scale, const OuterTile& tile,
      const DeviceTensor& gradient) const {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kTilesPerWarp; ++i) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t pair = pack<T>(sums[i][n][2 * half] * scale, sums[i][n][2 * half + 1] * scale);
          tile.store_pair(row_of(i, half), 8 * n + column_of_sum(lane_, 0), pair);
        }
      }
    }
    __syncwarp();
    const int head = kRowsAreKeys ? key_head_ : first_head_;
    const int num_rows = kRowsAreKeys ? call_.num_keys : call_.num_queries;
    const HeadRows<T> rows = rows_of_head<T>(gradient, batch_, head, call_.head_size);
    store_rows(tile, rows, first_row_of_warp_, 16 * kTilesPerWarp, lane_, [&](int row) -> int64_t {
      return first_outer_ + row < num_rows ? rows.offset_of(first_outer_ + row) : -1;
    });
  }

  const DeviceCall& call_;
  const DeviceGradients& gradients_;
  OuterTile outer_first_, outer_second_;
  unsigned char* inner_;
  int thread_, lane_, first_row_of_warp_;
  int batch_, first_head_, key_head_, first_outer_, blocks_of_inner_, num_steps_;
  const uint8_t* keys_seen_;
  TileCopy<T, InnerTile, kThreads> copy_first_, copy_second_;
  QueryFacts outer_facts_[kRowsAreKeys ? 1 : kTilesPerWarp][2];
  Sums first_gradient_[kHasFirst ? kTilesPerWarp : 1][kColumnTiles];
  Sums second_gradient_[kHasSecond ? kTilesPerWarp : 1][kColumnTiles];
};

template <class T, int kHeadSize, GradientOf kOf>
constexpr bool kIsCompiled = kHasProducts<T> && uses_gradient_kernel(kOf, kHeadSize, kGeneration);

template <class T, int kHeadSize, GradientOf kOf>
__global__ void __launch_bounds__(backward_shape(kOf, kHeadSize, kGeneration).num_threads(), 1)
    attention_backward_kernel(const DeviceCall call, const DeviceGradients gradients) {
  extern __shared__ __align__(128) unsigned char shared[];
  if constexpr (kIsCompiled<T, kHeadSize, kOf>) {
    BackwardBlock<T, kHeadSize, kOf>(call, gradients, shared).run();
  }
}

}  // namespace cuda
}  // namespace lmopt
