// A call as a kernel takes it, with all that it points to.
#pragma once

#include <optional>

#include "attention/attention_arguments.h"

namespace lmopt {

inline float* float_data(const torch::stable::Tensor& tensor) {
  return static_cast<float*>(const_cast<void*>(tensor.const_data_ptr()));
}

// Owns all that an AttentionCall points to, but the results.
class PreparedCall {
 public:
  // Of arguments that are checked and not empty.
  explicit PreparedCall(AttentionArguments arguments);

  AttentionCall with_results(const torch::stable::Tensor& output, const torch::stable::Tensor& logsumexp) const;

 private:
  void prepare_visibility();

  AttentionArguments arguments_;
  std::optional<VisibilityStorage> visibility_;
  AttentionCall call_{};
};

}  // namespace lmopt
