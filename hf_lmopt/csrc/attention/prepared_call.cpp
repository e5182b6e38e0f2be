#include "attention/prepared_call.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <new>

namespace lmopt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

PreparedCall::PreparedCall(AttentionArguments arguments) : arguments_(std::move(arguments)) {
  AttentionArguments& a = arguments_;
  a.query = make_rows_dense(a.query);
  a.key = make_rows_dense(a.key);
  a.value = make_rows_dense(a.value);
  call_.type = element_type_of(a.query);
  call_.batch_size = a.batch_size();
  call_.num_heads = a.num_heads();
  call_.num_key_heads = a.num_key_heads();
  call_.num_queries = a.num_queries();
  call_.num_keys = a.num_keys();
  call_.head_size = a.head_size();
  call_.query = describe(a.query);
  call_.key = describe(a.key);
  call_.value = describe(a.value);
  if (a.bias) {
    a.bias = make_rows_dense(*a.bias);
    call_.bias = describe_bias(*a.bias);
  }
  if (a.sinks) {
    a.sinks = torch::stable::contiguous(torch::stable::to(*a.sinks, ScalarType::Float));
    call_.sinks = float_data(*a.sinks);
  }
  call_.scale = a.scale;
  call_.softcap = a.softcap;
  call_.dropout_p = a.dropout_p;
  if (a.dropout_p > 0) call_.dropout_seed = *static_cast<const uint64_t*>(a.dropout_seed->const_data_ptr());
  call_.num_threads = torch::stable::get_num_threads();
  prepare_visibility();
}

AttentionCall PreparedCall::with_results(const Tensor& output, const Tensor& logsumexp) const {
  AttentionCall call = call_;
  call.output = describe(output);
  call.logsumexp = float_data(logsumexp);
  return call;
}

void PreparedCall::prepare_visibility() {
  AttentionArguments& a = arguments_;
  VisibilityOptions options{};
  options.num_queries = a.num_queries();
  options.num_keys = a.num_keys();
  options.num_heads = a.num_heads();
  options.num_key_heads = a.num_key_heads();
  options.is_causal = a.is_causal;
  options.window_left = a.window_left;
  options.window_right = a.window_right;
  if (a.cu_seqlens_q) {
    a.cu_seqlens_q = torch::stable::contiguous(*a.cu_seqlens_q);
    a.cu_seqlens_k = torch::stable::contiguous(*a.cu_seqlens_k);
    options.query_boundaries = static_cast<const int32_t*>(a.cu_seqlens_q->const_data_ptr());
    options.key_boundaries = static_cast<const int32_t*>(a.cu_seqlens_k->const_data_ptr());
    options.num_documents = a.cu_seqlens_q->numel() - 1;
  }
  options.mask = {nullptr, 1, 1, 0, 0, 0};
  if (a.mask) {
    a.mask = make_rows_dense(*a.mask);
    options.mask = describe_mask(*a.mask);
  }
  try {
    visibility_.emplace(options);
  } catch (const std::bad_alloc&) {
    STD_TORCH_CHECK(
        false, "No memory for the map of blocks of a mask of shape ", a.mask ? sizes_of(*a.mask) : "[]",
        ", which takes an eighth of the mask's. Free some, or say it by is_causal, window or cu_seqlens.");
  }
  call_.visibility = &visibility_->view();
}

}  // namespace lmopt
