// The units of scores. Without softcap and bias they stay what the product gave.
#pragma once

#include "attention/attention.h"
#include "cpu/attention/vector.h"

namespace lmopt {
namespace LMOPT_INSTRUCTION_SET {

inline bool has_plain_scores(const AttentionCall& call) {
  return call.softcap == 0 && call.bias.data == nullptr;
}

// A plain product times this is a score.
inline float score_scale(const AttentionCall& call) {
  return has_plain_scores(call) ? call.scale : 1.0f;
}

// And times this is what exp2 takes.
inline float exponent_scale(const AttentionCall& call) {
  return score_scale(call) * kLog2E;
}

}  // namespace LMOPT_INSTRUCTION_SET
}  // namespace lmopt
