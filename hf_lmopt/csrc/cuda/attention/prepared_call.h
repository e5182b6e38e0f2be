// A call as the kernels take it, with all that it points to, on the device.
#pragma once

#include <optional>
#include <vector>

#include "attention/attention_arguments.h"
#include "cuda/attention/call.h"
#include "cuda/attention/launch.h"
#include "cuda/attention/visibility.h"

namespace lmopt {
namespace cuda {

// Owns all that a DeviceCall points to, but the results; its kernels run on `stream`.
class PreparedCall {
 public:
  // Of arguments that are checked, with a batch that is not empty. Throws for what this card or these kernels lack.
  PreparedCall(AttentionArguments arguments, void* stream);

  DeviceCall with_results(const torch::stable::Tensor& output, const torch::stable::Tensor& logsumexp) const;
  const Card& card() const { return card_; }

 private:
  void check_card() const;
  void prepare_dropout();
  void prepare_visibility(void* stream);
  void prepare_intervals(const VisibilityRules& rules, void* stream);
  void prepare_map(const VisibilityRules& rules, void* stream);
  // Uninitialised memory that lives as long as the call.
  template <class T>
  T* allocate(int64_t count);

  AttentionArguments arguments_;
  std::vector<torch::stable::Tensor> workspaces_;
  Card card_{};
  DeviceCall call_{};
};

// A tensor [B, H, L, D] with dense rows.
DeviceTensor describe_on_device(const torch::stable::Tensor& tensor);

// The tensor itself if its last dimension is dense, else a contiguous copy.
torch::stable::Tensor make_rows_dense_on_device(const torch::stable::Tensor& tensor);

// [B, H, L, D] that lies in memory as [B, L, H, D].
torch::stable::Tensor new_projection(const torch::stable::Tensor& like);

torch::stable::Tensor new_contiguous(
    const std::vector<int64_t>& sizes, torch::headeronly::ScalarType type, const torch::stable::Tensor& like);

// Throws what the CUDA runtime says, unless `error` is 0.
void check_launch(int error, const char* what);

}  // namespace cuda
}  // namespace lmopt
