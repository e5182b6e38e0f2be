// The elements of one block as rows of float32: in the tensor's own memory where that is float32 and the block is
// whole, else in scratch rows in the first cache, converted on the way in and out, and filled up with zeros.
#pragma once

#include <cstring>

#include "cpu/convert.h"
#include "cpu/quantize.h"
#include "optim/fused_step.h"

namespace lmopt {
namespace LMOPT_INSTRUCTION_SET {

struct Position {
  const FusedTensor& tensor;
  int64_t offset;  // of the block's first element
  int count;       // elements in the block, kBlock but for the last
};

inline void fill_up(float* scratch, int count) {
  std::memset(scratch + count, 0, (kBlock - count) * sizeof(float));
}

inline float* load_row(ElementType type, const void* data, const Position& at, float* scratch) {
  if (type == ElementType::float32 && at.count == kBlock) {
    return static_cast<float*>(const_cast<void*>(data)) + at.offset;
  }
  const uint16_t* halves = static_cast<const uint16_t*>(data) + at.offset;
  switch (type) {
    case ElementType::float32:
      std::memcpy(scratch, static_cast<const float*>(data) + at.offset, at.count * sizeof(float));
      break;
    case ElementType::bfloat16:
      bfloat16_to_float32(halves, scratch, at.count);
      break;
    case ElementType::float16:
      float16_to_float32(halves, scratch, at.count);
      break;
  }
  fill_up(scratch, at.count);
  return scratch;
}

inline void store_row(ElementType type, void* data, const Position& at, const float* row) {
  uint16_t* halves = static_cast<uint16_t*>(data) + at.offset;
  switch (type) {
    case ElementType::float32:
      if (at.count < kBlock) std::memcpy(static_cast<float*>(data) + at.offset, row, at.count * sizeof(float));
      break;
    case ElementType::bfloat16:
      float32_to_bfloat16(row, halves, at.count);
      break;
    case ElementType::float16:
      float32_to_float16(row, halves, at.count);
      break;
  }
}

inline int quantized_count(const Position& at, int i) {
  return at.count - i < kQuantizedBlock ? at.count - i : kQuantizedBlock;
}

inline float* load_state_row(const FusedStep& step, int state, const Position& at, float* scratch) {
  const float* absmax = at.tensor.absmax[state];
  if (absmax == nullptr) return load_row(ElementType::float32, at.tensor.states[state], at, scratch);
  const uint8_t* codes = static_cast<const uint8_t*>(at.tensor.states[state]) + at.offset;
  for (int i = 0; i < at.count; i += kQuantizedBlock) {
    const float scale = absmax[(at.offset + i) / kQuantizedBlock];
    dequantize_row(*step.codebooks[state], scale, codes + i, scratch + i, quantized_count(at, i));
  }
  fill_up(scratch, at.count);
  return scratch;
}

inline void store_state_row(const FusedStep& step, int state, const Position& at, const float* row) {
  float* absmax = at.tensor.absmax[state];
  if (absmax == nullptr) return store_row(ElementType::float32, at.tensor.states[state], at, row);
  uint8_t* codes = static_cast<uint8_t*>(at.tensor.states[state]) + at.offset;
  for (int i = 0; i < at.count; i += kQuantizedBlock) {
    float& scale = absmax[(at.offset + i) / kQuantizedBlock];
    scale = quantize_row(*step.codebooks[state], row + i, codes + i, quantized_count(at, i));
  }
}

// One block of a parameter, its gradient and its states.
template <int num_states>
struct Rows {
  float* parameter;
  const float* gradient;
  float* states[num_states > 0 ? num_states : 1];
  alignas(64) float scratch[2 + num_states][kBlock];

  void load(const FusedStep& step, const Position& at) {
    parameter = load_row(at.tensor.parameter_type, at.tensor.parameter, at, scratch[0]);
    load_inputs_of_rule(step, at);
  }

  // For a sum: the parameter only where the gradient depends on it.
  void load_for_sum(const FusedStep& step, const Position& at) {
    static float zeros[kBlock];
    parameter = step.l2 == 0.0f ? zeros : load_row(at.tensor.parameter_type, at.tensor.parameter, at, scratch[0]);
    load_inputs_of_rule(step, at);
  }

  void load_inputs_of_rule(const FusedStep& step, const Position& at) {
    gradient = load_row(at.tensor.gradient_type, at.tensor.gradient, at, scratch[1]);
    for (int k = 0; k < num_states; ++k) states[k] = load_state_row(step, k, at, scratch[2 + k]);
  }

  void store(const FusedStep& step, const Position& at) const {
    store_row(at.tensor.parameter_type, at.tensor.parameter, at, parameter);
    for (int k = 0; k < num_states; ++k) store_state_row(step, k, at, states[k]);
  }
};

}  // namespace LMOPT_INSTRUCTION_SET
}  // namespace lmopt
