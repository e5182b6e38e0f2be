// Whether a codebook ascends is not looked at here, as on a CPU: reading it would wait for the device. One that does
// not gives codes that are not the nearest.
#include "cuda/fused_step_op.h"

#include <optional>

#include "cuda/device.h"
#include "cuda/fused_step.h"

namespace lmopt {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor new_row(int64_t length, ScalarType type, const Tensor& like) {
  return cuda::new_device_tensor({length}, {1}, type, like);
}

}  // namespace

void fused_step_cuda(const FusedStepArguments& arguments) {
  CheckedFusedStep checked = check_fused_step(arguments);
  if (checked.step.num_blocks == 0) return;

  const Tensor& like = arguments.parameters[0];
  const cuda::OnDevice on_device(like);
  cuda::DeviceFusedStep step{checked.step, {}, nullptr};
  for (int k = 0; k < kMaxStatesPerParameter; ++k) step.codebooks[k] = checked.codebooks[k];
  std::optional<Tensor> block_sums, scales;
  if (checked.needs_sums) {
    block_sums = new_row(step.step.num_blocks, ScalarType::Double, like);
    scales = new_row(2 * step.step.num_tensors, ScalarType::Float, like);
    step.step.block_sums = static_cast<double*>(block_sums->mutable_data_ptr());
    step.scales = static_cast<float*>(scales->mutable_data_ptr());
  }
  const char* error = cuda::fused_step(checked.rule, step, cuda::current_stream(like));
  STD_TORCH_CHECK(
      error == nullptr, "The fused step on CUDA could not be launched: ", error, ". The library has to have code for ",
      "the card, which `hf-lmopt doctor` tells. Mend that, or use the foreach step.");
}

}  // namespace lmopt
