#include "optim/fused_step_op.h"

#include "optim/codebook.h"

namespace lmopt {
namespace {

// Kernels point into it.
std::vector<Codebook> prepare_codebooks(const CheckedFusedStep& checked) {
  std::vector<Codebook> codebooks(kMaxStatesPerParameter);
  for (size_t k = 0; k < codebooks.size(); ++k) {
    if (checked.codebooks[k] == nullptr) continue;
    codebooks[k] = Codebook(checked.codebooks[k]);
    STD_TORCH_CHECK(
        codebooks[k].is_valid, "codebooks[", k, "] does not ascend within [-1, 1]. Nearest entries are searched by ",
        "their order. Sort it and divide it by its largest magnitude.");
  }
  return codebooks;
}

}  // namespace

void fused_step_cpu(const FusedStepArguments& arguments) {
  CheckedFusedStep checked = check_fused_step(arguments);
  const std::vector<Codebook> prepared = prepare_codebooks(checked);
  std::vector<double> block_sums(checked.needs_sums ? static_cast<size_t>(checked.step.num_blocks) : 0);

  FusedStep& step = checked.step;
  for (size_t k = 0; k < prepared.size(); ++k) step.codebooks[k] = &prepared[k];
  step.block_sums = block_sums.data();
  if (step.num_blocks > 0) LMOPT_CHOOSE_CPU_KERNEL(fused_step)(checked.rule, step);
}

}  // namespace lmopt
