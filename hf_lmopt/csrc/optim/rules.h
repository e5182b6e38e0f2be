// The update rules of the elementwise optimizers, one functor each: the gradient and the states of one element in, the
// step out, the states updated. Everything is float32 and free of branches, so that a compiler can vectorise a loop
// over elements; nvcc compiles the same functors. What all rules share (decay, cautious masking, storage types) is
// not here but in the kernels.
//
// The members of a functor are its coefficients, in the order of the operator's argument. A gradient that is not a
// number reaches the step: comparisons are written so that they keep a NaN.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define LMOPT_RULE __host__ __device__ __forceinline__
#else
#define LMOPT_RULE inline __attribute__((always_inline))
#endif

namespace lmopt {
namespace LMOPT_INSTRUCTION_SET {

LMOPT_RULE float square_root(float value) {
  return ::sqrtf(value);
}

LMOPT_RULE float sign(float value) {
  return value > 0.0f ? 1.0f : (value < 0.0f ? -1.0f : value);  // 0 and NaN give themselves
}

LMOPT_RULE float clamp(float value, float limit) {
  return value > limit ? limit : (value < -limit ? -limit : value);
}

struct Rule {
  static constexpr bool clips_correction = false;
};

// Gradient descent, and the first step of others.
struct PlainGradient : Rule {
  static constexpr int num_states = 0;
  float gradient_size;

  LMOPT_RULE float operator()(float g, float*) const { return gradient_size * g; }
};

// SGD with momentum and QHM, with or without Nesterov's lookahead.
struct LinearMomentum : Rule {
  static constexpr int num_states = 1;
  float momentum, gain, buffer_size, gradient_size;

  LMOPT_RULE float operator()(float g, float* state) const {
    float& buffer = state[0];
    buffer = momentum * buffer + gain * g;
    return buffer_size * buffer + gradient_size * g;
  }
};

// Signum and Lion.
struct SignMomentum : Rule {
  static constexpr int num_states = 1;
  float gradient_share, gain, size;

  LMOPT_RULE float operator()(float g, float* state) const {
    float& exp_avg = state[0];
    const float direction = exp_avg + gradient_share * (g - exp_avg);
    exp_avg += gain * (g - exp_avg);
    return size * sign(direction);
  }
};

// AdamW, NAdamW and QHAdam.
struct AdaptiveMomentum : Rule {
  static constexpr int num_states = 2;
  float gain, beta2, gain_sq, momentum_size, gradient_size, second_share, square_share, eps;

  LMOPT_RULE float operator()(float g, float* state) const {
    float &exp_avg = state[0], &exp_avg_sq = state[1];
    exp_avg += gain * (g - exp_avg);
    exp_avg_sq = beta2 * exp_avg_sq + gain_sq * g * g;
    const float scale = square_root(second_share * exp_avg_sq + square_share * g * g) + eps;
    return (momentum_size * exp_avg + gradient_size * g) / scale;
  }
};

struct AdEMAMix : Rule {
  static constexpr int num_states = 3;
  float gain, gain_slow, beta2, gain_sq, momentum_size, slow_size, second_share, eps;

  LMOPT_RULE float operator()(float g, float* state) const {
    float &exp_avg = state[0], &exp_avg_slow = state[1], &exp_avg_sq = state[2];
    exp_avg += gain * (g - exp_avg);
    exp_avg_slow += gain_slow * (g - exp_avg_slow);
    exp_avg_sq = beta2 * exp_avg_sq + gain_sq * g * g;
    return (momentum_size * exp_avg + slow_size * exp_avg_slow) / (square_root(second_share * exp_avg_sq) + eps);
  }
};

struct Adan : Rule {
  static constexpr int num_states = 4;
  float difference_share, gain, gain_diff, lookahead, beta3, gain_sq, momentum_size, diff_size, second_share, eps;

  LMOPT_RULE float operator()(float g, float* state) const {
    float &exp_avg = state[0], &exp_avg_diff = state[1], &exp_avg_sq = state[2], &previous_gradient = state[3];
    const float difference = difference_share * (g - previous_gradient);
    const float ahead = g + lookahead * difference;
    exp_avg += gain * (g - exp_avg);
    exp_avg_diff += gain_diff * (difference - exp_avg_diff);
    exp_avg_sq = beta3 * exp_avg_sq + gain_sq * ahead * ahead;
    previous_gradient = g;
    return (momentum_size * exp_avg + diff_size * exp_avg_diff) / (square_root(second_share * exp_avg_sq) + eps);
  }
};

struct Adopt : Rule {
  static constexpr int num_states = 2;
  float gain, beta2, gain_sq, size, eps, clip;

  LMOPT_RULE float operator()(float g, float* state) const {
    float &exp_avg = state[0], &exp_avg_sq = state[1];
    const float root = square_root(exp_avg_sq);
    const float normalized = clamp(g / (root < eps ? eps : root), clip);
    exp_avg += gain * (normalized - exp_avg);
    exp_avg_sq = beta2 * exp_avg_sq + gain_sq * g * g;
    return size * exp_avg;
  }
};

// MARS-AdamW. The corrected gradient is clipped by its norm over the tensor, which a kernel finds first.
struct Mars : Rule {
  static constexpr int num_states = 3;
  static constexpr bool clips_correction = true;
  float correction, gain, beta2, gain_sq, momentum_size, second_share, eps, max_norm;
  float correction_scale;  // set per tensor, no coefficient

  LMOPT_RULE float corrected_gradient(float g, const float* state) const { return g + correction * (g - state[2]); }

  LMOPT_RULE float operator()(float g, float* state) const {
    float &exp_avg = state[0], &exp_avg_sq = state[1], &previous_gradient = state[2];
    const float corrected = correction_scale * corrected_gradient(g, state);
    exp_avg += gain * (corrected - exp_avg);
    exp_avg_sq = beta2 * exp_avg_sq + gain_sq * corrected * corrected;
    previous_gradient = g;
    return momentum_size * exp_avg / (square_root(second_share * exp_avg_sq) + eps);
  }
};

template <class AnyRule>
constexpr int num_coefficients() {
  return static_cast<int>(sizeof(AnyRule) / sizeof(float)) - AnyRule::clips_correction;
}

// APPLY(name, functor) for every rule; the position in the list is the rule's number.
#define LMOPT_FOR_EACH_RULE(APPLY)             \
  APPLY(plain_gradient, PlainGradient)         \
  APPLY(linear_momentum, LinearMomentum)       \
  APPLY(sign_momentum, SignMomentum)           \
  APPLY(adaptive_momentum, AdaptiveMomentum)   \
  APPLY(ademamix, AdEMAMix)                    \
  APPLY(adan, Adan)                            \
  APPLY(adopt, Adopt)                          \
  APPLY(mars, Mars)

}  // namespace LMOPT_INSTRUCTION_SET
}  // namespace lmopt
