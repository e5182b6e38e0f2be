// The gradient of bias: that of the scores, summed up over the batch entries, heads and queries that share it.
//
// A block of threads takes some queries and some keys of one entry of the bias, and passes over all that share it, in
// order; it computes the scores once more, as nothing of their size is kept.
#pragma once

#include "cuda/attention/products.cuh"
#include "cuda/attention/score_gradients.cuh"
#include "cuda/attention/shapes.h"

namespace lmopt {
namespace cuda {

template <class T, int kHeadSize>
class BiasGradientBlock {
 public:
  LMOPT_DEVICE BiasGradientBlock(const DeviceCall& call, const DeviceGradients& gradients, unsigned char* shared)
      : call_(call),
        gradients_(gradients),
        queries_{shared},
        output_gradients_{shared + QueryTile::kBytes},
        keys_{shared + 2 * QueryTile::kBytes},
        values_{shared + 2 * QueryTile::kBytes + KeyTile::kBytes},
        column_sums_(reinterpret_cast<float*>(shared)),
        thread_(threadIdx.x),
        lane_(threadIdx.x % kWarpSize),
        warp_(threadIdx.x / kWarpSize) {
    find_place();
  }

  LMOPT_DEVICE void run() {
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) fill_zero(sums_[n]);
    for (int batch = first_batch_; batch < end_batch_; ++batch) {
      for (int head = first_head_; head < end_head_; ++head) {
        for (int query = first_query_; query < end_query_; query += kQueries) add_gradients_of(batch, head, query);
      }
    }
    if (is_one_row()) {
      store_columns();
    } else {
      store_rows_of_sums();
    }
  }

 private:
  static constexpr BackwardShape kShape = bias_gradient_shape(kHeadSize, kGeneration);
  static constexpr int kThreads = kShape.num_threads();
  static constexpr int kQueries = kShape.num_outer_rows();
  static constexpr int kKeys = kShape.num_inner_rows;
  static constexpr int kKeyTiles = kKeys / 8;
  using QueryTile = Tile<T, kQueries, kHeadSize>;
  using KeyTile = Tile<T, kKeys, kHeadSize>;
  static_assert(kShape.num_warps * kKeys * sizeof(float) <= 2 * QueryTile::kBytes, "column sums need a place");

  // Whether all queries share one row of the bias.
  LMOPT_DEVICE bool is_one_row() const { return gradients_.bias_num_queries == 1 && call_.num_queries != 1; }

  LMOPT_DEVICE void find_place() {
    const unsigned num_key_blocks = (call_.num_keys + kKeys - 1) / kKeys;
    const unsigned num_query_blocks = (gradients_.bias_num_queries + kQueries - 1) / kQueries;
    unsigned block = blockIdx.x;
    first_key_ = static_cast<int>(block % num_key_blocks) * kKeys;
    block /= num_key_blocks;
    first_query_ = static_cast<int>(block % num_query_blocks) * kQueries;
    block /= num_query_blocks;
    entry_ = static_cast<int>(block);
    const int batch = entry_ / gradients_.bias_num_heads, head = entry_ % gradients_.bias_num_heads;
    const bool shares_batch = gradients_.bias_batch_size == 1, shares_head = gradients_.bias_num_heads == 1;
    first_batch_ = shares_batch ? 0 : batch;
    end_batch_ = shares_batch ? call_.batch_size : batch + 1;
    first_head_ = shares_head ? 0 : head;
    end_head_ = shares_head ? call_.num_heads : head + 1;
    end_query_ = is_one_row() ? call_.num_queries : first_query_ + 1;
  }

  LMOPT_DEVICE void load(int batch, int head, int first_query) {
    const int key_head = head / (call_.num_heads / call_.num_key_heads);
    const uint8_t* keys_seen = call_.visibility.keys_seen(batch, key_head);
    const auto load_queries = [&](const QueryTile& tile, const DeviceTensor& tensor) {
      const HeadRows<T> rows = rows_of_head<T>(tensor, batch, head, call_.head_size);
      TileCopy<T, QueryTile, kThreads> copy;
      copy.begin(tile, rows, thread_, offsets_of_queries(rows, call_, batch, head, first_query));
      copy.finish(tile, thread_);
    };
    const auto load_keys = [&](const KeyTile& tile, const DeviceTensor& tensor) {
      const HeadRows<T> rows = rows_of_head<T>(tensor, batch, key_head, call_.head_size);
      TileCopy<T, KeyTile, kThreads> copy;
      copy.begin(tile, rows, thread_, offsets_of_keys(rows, keys_seen, first_key_, call_.num_keys));
      copy.finish(tile, thread_);
    };
    load_queries(queries_, call_.query);
    load_queries(output_gradients_, gradients_.output_gradient);
    load_keys(keys_, call_.key);
    load_keys(values_, call_.value);
  }

  LMOPT_DEVICE void add_gradients_of(int batch, int head, int first_query) {
    const BlockState state =
        state_of_tile(call_, batch, head, first_query, first_query + kQueries, first_key_, first_key_ + kKeys);
    if (state == BlockState::empty) return;
    __syncthreads();  // the tiles of the step before are read
    load(batch, head, first_query);
    __syncthreads();
    Sums weights[1][kKeyTiles], score_gradients[1][kKeyTiles];
    multiply_by_rows<T>(weights, queries_, 16 * warp_, keys_, lane_);
    multiply_by_rows<T>(score_gradients, output_gradients_, 16 * warp_, values_, lane_);
    const ScoreGradients<T, false> scores{call_, batch, head, state == BlockState::mixed, lane_};
    QueryFacts facts[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      facts[half] = load_facts(call_, gradients_, batch, head, first_query + row_of(half));
    }
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
      scores.turn(weights[0][n], score_gradients[0][n], first_query + 16 * warp_, first_key_ + 8 * n, facts, false);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums_[n][i] += score_gradients[0][n][i];
    }
  }

  LMOPT_DEVICE int row_of(int half) const { return 16 * warp_ + row_of_sum(lane_, 2 * half); }

  LMOPT_DEVICE float* row_of_bias(int64_t query) const {
    return gradients_.bias + (static_cast<int64_t>(entry_) * gradients_.bias_num_queries + query) * call_.num_keys;
  }

  LMOPT_DEVICE void store_rows_of_sums() const {
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int query = first_query_ + row_of(i >> 1), key = first_key_ + 8 * n + column_of_sum(lane_, i);
        if (query < call_.num_queries && key < call_.num_keys) row_of_bias(query)[key] = sums_[n][i];
      }
    }
  }

  // Over the rows of a warp by its lanes, then over the warps.
  LMOPT_DEVICE void store_columns() const {
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        float sum = sums_[n][side] + sums_[n][2 + side];
#pragma unroll
        for (int distance = 4; distance < kWarpSize; distance *= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
        if (lane_ < 4) column_sums_[warp_ * kKeys + 8 * n + column_of_sum(lane_, side)] = sum;
      }
    }
    __syncthreads();
    if (thread_ >= kKeys || first_key_ + thread_ >= call_.num_keys) return;
    float sum = 0;
    for (int warp = 0; warp < kShape.num_warps; ++warp) sum += column_sums_[warp * kKeys + thread_];
    row_of_bias(0)[first_key_ + thread_] = sum;
  }

  const DeviceCall& call_;
  const DeviceGradients& gradients_;
  QueryTile queries_, output_gradients_;
  KeyTile keys_, values_;
  float* column_sums_;
  int thread_, lane_, warp_;
  int entry_, first_batch_, end_batch_, first_head_, end_head_, first_query_, end_query_, first_key_;
  Sums sums_[kKeyTiles];
};

template <class T, int kHeadSize>
__global__ void __launch_bounds__(bias_gradient_shape(kHeadSize, kGeneration).num_threads(), 1)
    bias_gradient_kernel(const DeviceCall call, const DeviceGradients gradients) {
  extern __shared__ __align__(128) unsigned char shared[];
  if constexpr (kHasProducts<T>) BiasGradientBlock<T, kHeadSize>(call, gradients, shared).run();
}

}  // namespace cuda
}  // namespace lmopt
