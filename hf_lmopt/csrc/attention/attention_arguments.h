// The arguments of the operators of attention, as tensors, and whether a kernel may walk through their memory.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "attention/attention.h"
#include "attention/build_visibility.h"

namespace lmopt {

using MaybeTensor = std::optional<torch::stable::Tensor>;

// In the letters of hf_lmopt/attention/reference.py.
struct AttentionArguments {
  torch::stable::Tensor query, key, value;
  MaybeTensor mask, bias, sinks, cu_seqlens_q, cu_seqlens_k;
  float scale;
  bool is_causal;
  int64_t window_left, window_right;  // -1 for no limit
  float softcap;                      // 0 for none
  double dropout_p;
  MaybeTensor dropout_seed;

  int64_t batch_size() const { return query.size(0); }
  int64_t num_heads() const { return query.size(1); }
  int64_t num_key_heads() const { return key.size(1); }
  int64_t num_queries() const { return query.size(2); }
  int64_t num_keys() const { return key.size(2); }
  int64_t head_size() const { return query.size(3); }
  bool is_empty() const { return batch_size() == 0 || num_queries() == 0 || num_keys() == 0; }
};

// Of the backward pass, beside the arguments: what came out, and the gradients of that.
struct AttentionUpstream {
  torch::stable::Tensor output_gradient;
  MaybeTensor logsumexp_gradient;
  torch::stable::Tensor output, logsumexp;
  bool needs_bias_gradient, needs_sinks_gradient;
};

// Throws unless shapes and types are as the reference takes them, in a type that kernels take, and all on one device;
// boundaries and seed are checked where they are on the CPU.
void check_arguments(const AttentionArguments& arguments);

// Of arguments that are checked.
void check_upstream(const AttentionArguments& arguments, const AttentionUpstream& upstream);

bool is_on_same_device(const torch::stable::Tensor& first, const torch::stable::Tensor& second);

// Throws unless a tensor is on the query's device and has that type and those sizes.
void check_tensor(
    const char* name, const torch::stable::Tensor& tensor, const torch::stable::Tensor& query,
    torch::headeronly::ScalarType type, const std::vector<int64_t>& sizes);

// Throws unless it is one [B|1, Hq|1, Lq, Lk] of bool.
void check_mask(const torch::stable::Tensor& mask, const std::vector<int64_t>& score_sizes);

bool has_dense_rows(const torch::stable::Tensor& tensor);

// The tensor itself if its last dimension is dense, else a contiguous copy.
torch::stable::Tensor make_rows_dense(const torch::stable::Tensor& tensor);

// All of these take tensors whose rows are dense; `data` stays theirs.
ElementType element_type_of(const torch::stable::Tensor& tensor);
AttentionTensor describe(const torch::stable::Tensor& tensor);
AttentionBias describe_bias(const torch::stable::Tensor& bias);
AttentionMask describe_mask(const torch::stable::Tensor& mask);

// "[2, 8, 128, 64]"
std::string sizes_of(const torch::stable::Tensor& tensor);

}  // namespace lmopt
