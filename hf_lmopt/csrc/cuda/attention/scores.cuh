// From the product of a query and a key to their score, and on to an exponent of 2.
//
//   score    = scale * product;  softcap * tanh(score / softcap) if there is one;  + bias
//   exponent = score * log2(e)
//
// Without softcap and bias, sums stay the products that they are, and the two factors are one. With them scores may be
// large (a bias of -1e9 over a whole row) beside their differences, which are taken first.
#pragma once

#include "cuda/attention/call.h"
#include "cuda/attention/primitives.cuh"

namespace lmopt {
namespace cuda {

// Below it a score counts as -inf.
constexpr float kLowestScore = -1e30f;

LMOPT_DEVICE bool needs_scores(const DeviceCall& call) { return call.softcap > 0 || call.bias.data != nullptr; }

// Of a sum: a score if needs_scores(), else a product.
LMOPT_DEVICE float exponent_scale(const DeviceCall& call) {
  return needs_scores(call) ? kLog2E : call.scale * kLog2E;
}

// The exponent of a score, or of a product where those count, above an origin: one of the same kind with scores, else
// the exponent of one.
LMOPT_DEVICE float exponent_above(bool has_scores, float score, float factor, float origin) {
  return has_scores ? (score - origin) * factor : fmaf(score, factor, -origin);
}

// Where the bias of one query begins; of a query that does not exist, anywhere.
LMOPT_DEVICE int64_t offset_of_bias(const DeviceBias& bias, int64_t batch, int64_t head, int64_t query) {
  return batch * bias.batch_stride + head * bias.head_stride + query * bias.row_stride;
}

template <class T>
LMOPT_DEVICE float load_bias(const DeviceBias& bias, int64_t offset) {
  if (bias.type == ElementType::float32) return static_cast<const float*>(bias.data)[offset];
  return to_float(static_cast<const T*>(bias.data)[offset]);
}

// The score of a product. `slope`, if asked for, is the softcap's: d score / d (scale * product).
template <class T>
LMOPT_DEVICE float apply_rules(
    const DeviceCall& call, float product, int64_t offset_of_bias, int key, float* slope = nullptr) {
  float score = product * call.scale;
  if (call.softcap > 0) {
    const float bounded = tanhf(score / call.softcap);  // an absolute error would be multiplied by softcap
    score = call.softcap * bounded;
    if (slope != nullptr) *slope = 1.0f - bounded * bounded;
  }
  if (call.bias.data != nullptr && key < call.num_keys) score += load_bias<T>(call.bias, offset_of_bias + key);
  return score;
}

}  // namespace cuda
}  // namespace lmopt
