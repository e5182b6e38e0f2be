// Backward attention of a whole call: first what belongs to each row, then key heads or parts of their keys as tasks.
#pragma once

#include "cpu/attention/bias_gradient.h"

namespace lmopt {
namespace LMOPT_INSTRUCTION_SET {

// As in the forward pass, the sizes depend on shapes alone.
constexpr int64_t kWantedBackwardTasks = 16;
constexpr int64_t kMostBackwardParts = 8;  // each has its own dQ in memory
constexpr int64_t kLeastBackwardKeyBlocks = 8;

class BackwardTasks {
 public:
  BackwardTasks(const AttentionCall& call, const AttentionGradients& gradients) : call_(call), gradients_(gradients) {}

  template <class Products>
  bool run() {
    const int64_t rows = call_.batch_size * call_.num_heads;
    BackwardProblem problem{call_, gradients_, nullptr, num_parts(), nullptr};
    const int64_t parts_floats = rows * problem.num_parts * problem.query_blocks() * problem.query_gradient_floats();
    const int64_t delta_place = workspace_.plan(rows * call_.num_queries);
    const int64_t parts_place = workspace_.plan(problem.num_parts > 1 ? parts_floats : 0);
    if (!workspace_.allocate()) return false;
    compute_delta(workspace_.at(delta_place));
    problem.delta = workspace_.at(delta_place);
    if (problem.num_parts > 1) problem.query_gradient_parts = workspace_.at(parts_place);
    if (gradients_.sinks != nullptr) compute_sinks(problem.delta);
    const int64_t num_tasks = call_.batch_size * call_.num_key_heads * problem.num_parts;
    if (!run_all<Backward<Products>>(problem, num_tasks)) return false;
    if (problem.num_parts > 1 && !add_parts<Products>(problem)) return false;
    return gradients_.bias == nullptr ||
        run_all<BiasGradient<Products>>(problem, BiasGradient<Products>::num_tasks(problem));
  }

 private:
  int64_t num_parts() const {
    const int64_t tasks = call_.batch_size * call_.num_key_heads;
    int64_t parts = (kWantedBackwardTasks + tasks - 1) / tasks;
    const int64_t most = num_attention_blocks(call_.num_keys) / kLeastBackwardKeyBlocks;
    parts = parts < most ? parts : most;
    parts = parts < kMostBackwardParts ? parts : kMostBackwardParts;
    return parts > 1 ? parts : 1;
  }

  template <class Worker>
  bool run_all(const BackwardProblem& problem, int64_t num_tasks) const {
    return run_tasks<Worker>(
        call_.num_threads, num_tasks, problem, [](Worker& worker, int64_t task) { worker.run(task); });
  }

  // delta = dO O - dlogsumexp, [B, Hq, Lq].
  void compute_delta(float* delta) const {
    const int64_t head_size = call_.head_size, num_queries = call_.num_queries;
    const int64_t least = 1 + 65536 / head_size;
    parallel_for(0, call_.batch_size * call_.num_heads * num_queries, least, [&](int64_t first, int64_t end) {
      Vector output[kMaxVectors], gradient[kMaxVectors];
      for (int64_t row = first; row < end; ++row) {
        const int64_t entry = row / num_queries, query = row % num_queries;
        const int64_t batch = entry / call_.num_heads, head = entry % call_.num_heads;
        delta[row] = dot(
            row_address(call_.output, call_.type, batch, head, query),
            row_address(gradients_.output_gradient, call_.type, batch, head, query), output, gradient);
        if (gradients_.logsumexp_gradient != nullptr) delta[row] -= gradients_.logsumexp_gradient[row];
      }
    });
  }

  static constexpr int kMaxVectors = 64 / kLanes;  // 64 numbers at a time

  float dot(const char* a, const char* b, Vector* first, Vector* second) const {
    Vector sum{};
    for (int64_t d = 0; d < call_.head_size; d += 64) {
      const int64_t count = call_.head_size - d < 64 ? call_.head_size - d : 64;
      for (int i = 0; i < kMaxVectors; ++i) first[i] = second[i] = Vector{};
      to_float32(call_.type, a + d * size_of(call_.type), reinterpret_cast<float*>(first), count);
      to_float32(call_.type, b + d * size_of(call_.type), reinterpret_cast<float*>(second), count);
      for (int i = 0; i < kMaxVectors; ++i) sum = multiply_add(first[i], second[i], sum);
    }
    return sum_of_lanes(sum);
  }

  // A sink is a key of value 0: dP = 0, so its gradient is -weight * delta.
  void compute_sinks(const float* delta) const {
    for (int64_t head = 0; head < call_.num_heads; ++head) {
      double sum = 0;
      for (int64_t batch = 0; batch < call_.batch_size; ++batch) {
        const int64_t first = (batch * call_.num_heads + head) * call_.num_queries;
        for (int64_t i = first; i < first + call_.num_queries; ++i) {
          const float logsumexp = call_.logsumexp[i];
          if (logsumexp != -kInfinity) sum -= __builtin_expf(call_.sinks[head] - logsumexp) * delta[i];
        }
      }
      gradients_.sinks[head] = static_cast<float>(sum);
    }
  }

  template <class Products>
  struct PartAdder {
    const BackwardProblem& problem;
    Workspace workspace;
    int64_t place;

    explicit PartAdder(const BackwardProblem& problem)
        : problem(problem), place(workspace.plan(kPanel * round_up(problem.call.head_size, kPanel))) {}

    bool allocate() { return workspace.allocate(); }

    void run(int64_t task) {
      const int64_t blocks = problem.query_blocks(), floats = problem.query_gradient_floats();
      const int64_t entry = task / blocks, index = task % blocks;
      float* sum = problem.query_gradient_parts + (entry * problem.num_parts * blocks + index) * floats;
      for (int64_t part = 1; part < problem.num_parts; ++part) {
        const float* other = sum + part * blocks * floats;
        for (int64_t i = 0; i < floats; ++i) sum[i] += other[i];
      }
      const QueryBlock block =
          problem.query_block(entry / problem.call.num_heads, entry % problem.call.num_heads, index);
      store_query_gradient<Products>(problem, block, sum, workspace.at(place));
    }
  };

  template <class Products>
  bool add_parts(const BackwardProblem& problem) const {
    return run_all<PartAdder<Products>>(problem, call_.batch_size * call_.num_heads * problem.query_blocks());
  }

  const AttentionCall& call_;
  const AttentionGradients& gradients_;
  Workspace workspace_;
};

}  // namespace LMOPT_INSTRUCTION_SET
}  // namespace lmopt
