// What the operators hand to the kernels: pointers to memory of the device, by value in the arguments of a launch.
//
// B batch, Hq and Hkv heads, Lq queries, Lk keys, D head size, as in hf_lmopt/attention/reference.py.
#pragma once

#include <cstdint>

#include "attention/visibility.h"
#include "element_type.h"

namespace lmopt {
namespace cuda {

// [B, H, L, D] whose last dimension is dense; strides in elements, 0 where it is broadcast.
struct DeviceTensor {
  void* data;
  int64_t batch_stride, head_stride, row_stride;
  bool is_aligned;  // whether rows begin and end at multiples of 16 bytes
};

// [B|1, Hq|1, Lq|1, Lk] with a dense last dimension; data is null if there is none.
struct DeviceBias {
  const void* data;
  ElementType type;
  int64_t batch_stride, head_stride, row_stride;
};

struct Dropout {
  uint32_t threshold;     // words below it are dropped; 0 keeps all
  float kept_scale;       // 1 / (1 - p)
  const uint64_t* seed;   // on the device, or null
  uint64_t seed_on_host;  // where there is none on the device
};

// Of the keys that a block of 64 queries sees: the first and the last that any sees, and those that all see.
struct BlockInterval {
  int32_t first_of_any, end_of_any, first_of_all, end_of_all;
};

struct QueryPlace {
  int64_t batch, head, query;
};

struct DeviceCall {
  ElementType type;
  int32_t batch_size, num_heads, num_key_heads, num_queries, num_keys, head_size;
  DeviceTensor query, key, value, output;
  DeviceBias bias;
  const float* sinks;  // [Hq], or null
  float* logsumexp;    // [B, Hq, Lq]
  float scale;
  float softcap;  // 0 for none
  Dropout dropout;
  // Either intervals or a map, which then has all in it; neither where all see all.
  Visibility visibility;
  const BlockInterval* block_intervals;  // [query blocks], with the intervals

  // Of the rows [B, Hq, Lq].
  LMOPT_ALWAYS_INLINE int64_t num_rows() const {
    return static_cast<int64_t>(batch_size) * num_heads * num_queries;
  }

  LMOPT_ALWAYS_INLINE int64_t row_of(int64_t batch, int64_t head, int64_t query) const {
    return (batch * num_heads + head) * num_queries + query;
  }

  // Divisions of 64 bits take several times as long, and are needed for few.
  LMOPT_ALWAYS_INLINE QueryPlace place_of(int64_t row) const {
    const auto narrow = static_cast<uint32_t>(row);
    return narrow == row ? divide<uint32_t>(narrow) : divide<int64_t>(row);
  }

  template <class Integer>
  LMOPT_ALWAYS_INLINE QueryPlace divide(Integer row) const {
    const auto heads = static_cast<Integer>(num_heads), queries = static_cast<Integer>(num_queries);
    return {row / queries / heads, row / queries % heads, row % queries};
  }
};

// Of the forward pass that splits the keys: each part's output and logsumexp, to be combined.
struct SplitKeys {
  int32_t num_splits;
  float* output;     // [splits, B, Hq, Lq, D]
  float* logsumexp;  // [splits, B, Hq, Lq]
};

struct DeviceGradients {
  DeviceTensor output_gradient;
  const float* logsumexp_gradient;  // [B, Hq, Lq], or null
  DeviceTensor query, key, value;
  float* origins;    // [B, Hq, Lq]: the logsumexp as exponent_above() takes it, inf where nothing is seen
  float* deltas;     // [B, Hq, Lq]: output * its gradient, less that of the logsumexp
  float* bias;       // contiguous [Bb, Hb, Qb, Lk], or null
  int32_t bias_batch_size, bias_num_heads, bias_num_queries;
  float* sinks;  // [Hq], or null
};

}  // namespace cuda
}  // namespace lmopt
