// The fused optimizer step on a CPU: one pass over parameter, gradient and states, for any rule of optim/rules.h.
//
// Work is cut into blocks of kBlock elements, numbered through all tensors of a call, and each thread takes an equal
// run of them. A block is worked on as rows of float32 (rows.h), which are always whole, so that every loop has one
// length and rounds alike everywhere. Sums over a tensor are taken per block, then in order: results do not depend on
// the number of threads.
#include "optim/fused_step.h"

#include <cstring>

#include "cpu/rows.h"
#include "optim/rules.h"
#include "parallel.h"

#if defined(__clang__)
#define LMOPT_INDEPENDENT_ITERATIONS _Pragma("clang loop vectorize(assume_safety)")
#else
#define LMOPT_INDEPENDENT_ITERATIONS _Pragma("GCC ivdep")
#endif

namespace lmopt {
namespace LMOPT_INSTRUCTION_SET {
namespace {

constexpr int64_t kGrainBlocks = 16;
// Tensors that are summed over before they are stepped are taken so many blocks at a time: the second reading then
// finds them in the shared cache.
constexpr int64_t kBlocksInCache = 512;

// ---- loops over a block ---------------------------------------------------------------------------------------------

template <class AnyRule>
using RowsOf = Rows<AnyRule::num_states>;

// The gradient with its penalty and the states of element i.
template <class AnyRule>
struct Element {
  float gradient;
  float states[AnyRule::num_states > 0 ? AnyRule::num_states : 1];

  LMOPT_RULE Element(const FusedStep& step, const RowsOf<AnyRule>& rows, int i) {
    gradient = rows.gradient[i] + step.l2 * rows.parameter[i];
    for (int k = 0; k < AnyRule::num_states; ++k) states[k] = rows.states[k][i];
  }
};

template <bool cautious, class AnyRule>
void update_rows(const AnyRule rule, const FusedStep& step, float cautious_scale, const RowsOf<AnyRule>& rows) {
  const float shrink_before = step.shrink_before, shrink_after = step.shrink_after;
  LMOPT_INDEPENDENT_ITERATIONS
  for (int i = 0; i < kBlock; ++i) {
    Element<AnyRule> element(step, rows, i);
    float change = rule(element.gradient, element.states);
    // Written so that a NaN is kept.
    if (cautious) change = change * element.gradient <= 0.0f ? 0.0f : change * cautious_scale;
    for (int k = 0; k < AnyRule::num_states; ++k) rows.states[k][i] = element.states[k];
    rows.parameter[i] = (rows.parameter[i] * shrink_before - change) * shrink_after;
  }
}

// Number of elements whose step and gradient have the same sign.
template <class AnyRule>
double count_agreeing(const AnyRule rule, const FusedStep& step, const RowsOf<AnyRule>& rows) {
  int count = 0;
  for (int i = 0; i < kBlock; ++i) {
    Element<AnyRule> element(step, rows, i);
    const float change = rule(element.gradient, element.states);
    count += change * element.gradient > 0.0f;
  }
  return count;
}

template <class AnyRule>
double sum_corrected_squares(const AnyRule rule, const FusedStep& step, const RowsOf<AnyRule>& rows) {
  constexpr int kLanes = 16;
  double sums[kLanes] = {};
  for (int i = 0; i < kBlock; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const Element<AnyRule> element(step, rows, i + lane);
      const double corrected = rule.corrected_gradient(element.gradient, element.states);
      sums[lane] += corrected * corrected;
    }
  }
  double sum = 0.0;
  for (const double lane : sums) sum += lane;
  return sum;
}

// ---- loops over all blocks ------------------------------------------------------------------------------------------

int64_t find_tensor(const FusedStep& step, int64_t block) {
  int64_t low = 0, high = step.num_tensors;  // the last tensor that starts at `block` or before
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (step.tensors[middle].first_block <= block ? low : high) = middle;
  }
  return low;
}

// Calls body(block, position) for every block, in parallel.
template <class Body>
void for_each_block(const FusedStep& step, const Body& body) {
  const int64_t first_block = step.tensors[0].first_block;
  parallel_for(first_block, first_block + step.num_blocks, kGrainBlocks, [&](int64_t begin, int64_t end) {
    int64_t index = find_tensor(step, begin);
    for (int64_t block = begin; block < end; ++block) {
      while (index + 1 < step.num_tensors && step.tensors[index + 1].first_block <= block) ++index;
      const FusedTensor& tensor = step.tensors[index];
      const int64_t offset = (block - tensor.first_block) * kBlock, left = tensor.numel - offset;
      body(block, Position{tensor, offset, static_cast<int>(left < kBlock ? left : kBlock)});
    }
  });
}

// Calls finish(tensor, sum) with the sum over a tensor's blocks of sum_rows(position, rows).
template <class AnyRule, class SumRows, class Finish>
void reduce_tensors(const FusedStep& step, const SumRows& sum_rows, const Finish& finish) {
  for_each_block(step, [&](int64_t block, const Position& at) {
    RowsOf<AnyRule> rows;
    rows.load_for_sum(step, at);
    step.block_sums[block] = sum_rows(at, rows);
  });
  for (int64_t index = 0; index < step.num_tensors; ++index) {
    FusedTensor& tensor = step.tensors[index];
    const double* block_sums = step.block_sums + tensor.first_block;
    double sum = 0.0;
    for (int64_t block = 0; block < num_blocks(tensor); ++block) sum += block_sums[block];
    finish(tensor, sum);
  }
}

Mars with_scale(Mars rule, const FusedTensor& tensor) {
  rule.correction_scale = tensor.correction_scale;
  return rule;
}

template <class AnyRule>
AnyRule with_scale(AnyRule rule, const FusedTensor&) {
  return rule;
}

template <class AnyRule>
void find_scales(const AnyRule rule, const FusedStep& step) {
  if constexpr (AnyRule::clips_correction) {
    reduce_tensors<AnyRule>(
        step,
        [&](const Position&, const RowsOf<AnyRule>& rows) { return sum_corrected_squares(rule, step, rows); },
        [&](FusedTensor& tensor, double sum) {
          const double norm = __builtin_sqrt(sum);
          tensor.correction_scale = norm > rule.max_norm ? static_cast<float>(rule.max_norm / norm) : 1.0f;
        });
  }
  if (step.cautious) {
    reduce_tensors<AnyRule>(
        step,
        [&](const Position& at, const RowsOf<AnyRule>& rows) {
          return count_agreeing(with_scale(rule, at.tensor), step, rows);
        },
        [](FusedTensor& tensor, double count) {
          tensor.cautious_scale = static_cast<float>(static_cast<double>(tensor.numel) / (count + 1.0));
        });
  }
}

template <class AnyRule>
void update_tensors(const AnyRule rule, const FusedStep& step) {
  for_each_block(step, [&](int64_t, const Position& at) {
    RowsOf<AnyRule> rows;
    rows.load(step, at);
    if (step.cautious) {
      update_rows<true>(with_scale(rule, at.tensor), step, at.tensor.cautious_scale, rows);
    } else {
      update_rows<false>(with_scale(rule, at.tensor), step, 1.0f, rows);
    }
    rows.store(step, at);
  });
}

// The next tensors of a step, as many as fit into the cache, or one.
FusedStep take_part(const FusedStep& step, int64_t first_tensor) {
  FusedStep part = step;
  part.tensors += first_tensor;
  part.num_tensors = part.num_blocks = 0;
  while (first_tensor + part.num_tensors < step.num_tensors && part.num_blocks < kBlocksInCache) {
    part.num_blocks += num_blocks(part.tensors[part.num_tensors++]);
  }
  return part;
}

template <class AnyRule>
void run_rule(const FusedStep& step) {
  AnyRule rule{};
  std::memcpy(static_cast<void*>(&rule), step.coefficients, num_coefficients<AnyRule>() * sizeof(float));
  if (!AnyRule::clips_correction && !step.cautious) return update_tensors(rule, step);
  for (int64_t tensor = 0; tensor < step.num_tensors;) {
    const FusedStep part = take_part(step, tensor);
    find_scales(rule, part);
    update_tensors(rule, part);
    tensor += part.num_tensors;
  }
}

}  // namespace

void fused_step(int rule, const FusedStep& step) {
  using RunRule = void (*)(const FusedStep&);
#define LMOPT_RUN_RULE(name, AnyRule) &run_rule<AnyRule>,
  static constexpr RunRule run[] = {LMOPT_FOR_EACH_RULE(LMOPT_RUN_RULE)};
#undef LMOPT_RUN_RULE
  run[rule](step);
}

}  // namespace LMOPT_INSTRUCTION_SET
}  // namespace lmopt
