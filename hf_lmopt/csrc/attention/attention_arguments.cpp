// The checks of hf_lmopt/attention/inputs.py once more, where they protect memory, and those that read values: they
// stand here, since a traced program cannot look into its tensors.
#include "attention/attention_arguments.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <limits>
#include <vector>

namespace lmopt {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

constexpr size_t kMaxShownBoundaries = 8;

std::string join(const Sizes& numbers) {
  std::string text = "[";
  for (size_t i = 0; i < numbers.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(numbers[i]);
  return text + "]";
}

Sizes sizes_as_vector(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Sizes(sizes.begin(), sizes.end());
}

const char* name_of(ScalarType type) { return torch::headeronly::toString(type); }

void check_device(const char* name, const Tensor& tensor, const Tensor& query) {
  STD_TORCH_CHECK(
      is_on_same_device(tensor, query), name, " is not on the device of query. All tensors must be on one device: ",
      "move it there.");
}

void check_type(const char* name, const Tensor& tensor, ScalarType type) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == type, name, " is of type ", name_of(tensor.scalar_type()), ". It must be of type ",
      name_of(type), ": convert it.");
}

void check_projections(const AttentionArguments& arguments) {
  const Tensor& query = arguments.query;
  STD_TORCH_CHECK(
      query.dim() == 4 && arguments.key.dim() == 4, "query has shape ", sizes_of(query), " and key ",
      sizes_of(arguments.key), ". They must have four dimensions, [batch, heads, length, head size]: reshape them.");
  const ScalarType type = query.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, "query is of type ",
      name_of(type), ". The compiled attention takes float32, bfloat16 and float16: convert it.");
  STD_TORCH_CHECK(
      arguments.head_size() >= 1 && arguments.num_key_heads() >= 1 && arguments.num_heads() >= 1 &&
          arguments.num_heads() % arguments.num_key_heads() == 0,
      "query has shape ", sizes_of(query), " and key ", sizes_of(arguments.key), ". The head size must be at least 1 ",
      "and the query heads a multiple of the key heads: leave key and value unrepeated.");
  const Sizes sizes = {
      arguments.batch_size(), arguments.num_key_heads(), arguments.num_keys(), arguments.head_size()};
  check_tensor("key", arguments.key, query, type, sizes);
  check_tensor("value", arguments.value, query, type, sizes);
  constexpr int64_t kMaxLength = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(
      arguments.num_queries() <= kMaxLength && arguments.num_keys() <= kMaxLength, "query has shape ",
      sizes_of(query), " and key ", sizes_of(arguments.key), ". Lengths must stay below 2**31: split the sequence.");
}

// The dimensions before `first_fixed` may be 1.
void check_broadcast(
    const char* name, const Tensor& tensor, const Sizes& score_sizes, const char* letters, int first_fixed) {
  bool fits = tensor.dim() == 4;
  for (int dim = 0; fits && dim < 4; ++dim) {
    fits = tensor.size(dim) == score_sizes[dim] || (tensor.size(dim) == 1 && dim < first_fixed);
  }
  STD_TORCH_CHECK(
      fits, name, " has shape ", sizes_of(tensor), " for scores of shape ", join(score_sizes), ". It must be ",
      letters, ": unsqueeze or expand it.");
}

// bias and sinks have the query's type or float32.
void check_float(const char* name, const Tensor& tensor, ScalarType query_type) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == query_type, name, " is of type ", name_of(type), " and query of ",
      name_of(query_type), ". It must be of the query's type or float32: convert it.");
}

void check_boundaries(
    const char* name, const Tensor& tensor, const Tensor& query, int64_t length, int64_t num_boundaries) {
  check_tensor(name, tensor, query, ScalarType::Int, {num_boundaries});
  if (!tensor.is_cpu()) {  // reading it would wait for the device
    STD_TORCH_CHECK(
        num_boundaries >= 2, name, " has ", num_boundaries, " entries for a length of ", length, ". Each document has ",
        "a beginning and an end: give at least [0, length].");
    return;
  }
  const Tensor dense = torch::stable::contiguous(tensor);
  const auto* values = static_cast<const int32_t*>(dense.const_data_ptr());
  bool is_valid = num_boundaries > 0 && values[0] == 0 && values[num_boundaries - 1] == length;
  for (int64_t n = 1; is_valid && n < num_boundaries; ++n) is_valid = values[n - 1] <= values[n];
  if (is_valid) return;
  Sizes shown(values, values + num_boundaries);
  std::string text = join(shown);
  if (shown.size() > kMaxShownBoundaries) {
    shown.resize(kMaxShownBoundaries - 2);
    text = join(shown);
    text.replace(text.size() - 1, 1, ", ..., " + std::to_string(values[num_boundaries - 1]) + "]");
  }
  STD_TORCH_CHECK(
      false, name, " is ", text, " for a length of ", length, ". It must begin with 0, never fall, and end with the ",
      "length: give tokens of padding a document of their own, or cut them off.");
}

void check_packing(const AttentionArguments& arguments) {
  const MaybeTensor &of_queries = arguments.cu_seqlens_q, &of_keys = arguments.cu_seqlens_k;
  if (!of_queries && !of_keys) return;
  STD_TORCH_CHECK(
      of_queries && of_keys, of_queries ? "cu_seqlens_k" : "cu_seqlens_q", " is missing. Packed documents need the ",
      "boundaries of queries and of keys: give both.");
  STD_TORCH_CHECK(
      arguments.batch_size() == 1, "cu_seqlens_q was given with a batch of ", arguments.batch_size(),
      ". Packed documents lie in one row, so the batch must be 1: concatenate them along the length.");
  STD_TORCH_CHECK(
      of_queries->dim() == 1, "cu_seqlens_q has shape ", sizes_of(*of_queries), ". It must be a vector: flatten it.");
  const int64_t num_boundaries = of_queries->size(0);
  check_boundaries("cu_seqlens_q", *of_queries, arguments.query, arguments.num_queries(), num_boundaries);
  check_boundaries("cu_seqlens_k", *of_keys, arguments.query, arguments.num_keys(), num_boundaries);
}

void check_dropout(const AttentionArguments& arguments) {
  STD_TORCH_CHECK(
      arguments.dropout_p >= 0 && arguments.dropout_p < 1, "dropout_p=", arguments.dropout_p,
      " is outside [0, 1): it is the share of weights that are dropped. Use a value such as 0.1.");
  if (arguments.dropout_p == 0) return;
  STD_TORCH_CHECK(
      arguments.dropout_seed, "dropout_p=", arguments.dropout_p,
      " was given without dropout_seed. What is dropped depends on the seed alone: draw one for each call.");
  const Tensor& seed_tensor = *arguments.dropout_seed;
  if (!seed_tensor.is_cpu()) check_device("dropout_seed", seed_tensor, arguments.query);
  check_type("dropout_seed", seed_tensor, ScalarType::Long);
  STD_TORCH_CHECK(
      seed_tensor.numel() == 1, "dropout_seed has shape ", sizes_of(seed_tensor),
      ". It must be one number: draw it by torch.randint(2**63 - 1, ()).");
  if (!seed_tensor.is_cpu()) return;
  const int64_t seed = *static_cast<const int64_t*>(seed_tensor.const_data_ptr());
  STD_TORCH_CHECK(
      seed >= 0, "dropout_seed=", seed, " is outside [0, 2**63): its 63 bits are the key of the generator. Draw it ",
      "by torch.randint(2**63 - 1, ()).");
}

}  // namespace

std::string sizes_of(const Tensor& tensor) { return join(sizes_as_vector(tensor)); }

bool is_on_same_device(const Tensor& first, const Tensor& second) {
  return first.is_cpu() == second.is_cpu() && first.get_device_index() == second.get_device_index();
}

void check_tensor(
    const char* name, const Tensor& tensor, const Tensor& query, ScalarType type, const Sizes& sizes) {
  check_device(name, tensor, query);
  check_type(name, tensor, type);
  STD_TORCH_CHECK(
      sizes_as_vector(tensor) == sizes, name, " has shape ", sizes_of(tensor), ". It must be ", join(sizes),
      " by the other arguments: correct it.");
}

void check_mask(const Tensor& mask, const Sizes& score_sizes) {
  STD_TORCH_CHECK(
      mask.scalar_type() == ScalarType::Bool, "mask is of type ", name_of(mask.scalar_type()), ". It must be bool, ",
      "true where a query may see a key: convert it, or give numbers that are added to the scores as bias.");
  check_broadcast("mask", mask, score_sizes, "[B|1, Hq|1, Lq, Lk]", 2);
}

void check_arguments(const AttentionArguments& arguments) {
  check_projections(arguments);
  const ScalarType type = arguments.query.scalar_type();
  const Sizes score_sizes = {
      arguments.batch_size(), arguments.num_heads(), arguments.num_queries(), arguments.num_keys()};
  if (arguments.mask) {
    check_device("mask", *arguments.mask, arguments.query);
    check_mask(*arguments.mask, score_sizes);
  }
  if (arguments.bias) {
    check_device("bias", *arguments.bias, arguments.query);
    check_float("bias", *arguments.bias, type);
    check_broadcast("bias", *arguments.bias, score_sizes, "[B|1, Hq|1, Lq|1, Lk]", 3);
  }
  if (arguments.sinks) {
    check_float("sinks", *arguments.sinks, type);
    check_tensor(
        "sinks", *arguments.sinks, arguments.query, arguments.sinks->scalar_type(), {arguments.num_heads()});
  }
  check_packing(arguments);
  STD_TORCH_CHECK(
      arguments.window_left >= -1 && arguments.window_right >= -1, "window_left=", arguments.window_left,
      " and window_right=", arguments.window_right, " are not both allowed: they are numbers of keys, at least 0, or ",
      "-1. Use -1 for a side without a limit.");
  check_dropout(arguments);
}

void check_upstream(const AttentionArguments& arguments, const AttentionUpstream& upstream) {
  const Tensor& query = arguments.query;
  const Sizes row_sizes = {arguments.batch_size(), arguments.num_heads(), arguments.num_queries()};
  Sizes sizes = row_sizes;
  sizes.push_back(arguments.head_size());
  check_tensor("output_gradient", upstream.output_gradient, query, query.scalar_type(), sizes);
  check_tensor("output", upstream.output, query, query.scalar_type(), sizes);
  check_tensor("logsumexp", upstream.logsumexp, query, ScalarType::Float, row_sizes);
  if (!upstream.logsumexp_gradient) return;
  check_tensor("logsumexp_gradient", *upstream.logsumexp_gradient, query, ScalarType::Float, row_sizes);
}

bool has_dense_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1;
}

Tensor make_rows_dense(const Tensor& tensor) {
  return has_dense_rows(tensor) ? tensor : torch::stable::contiguous(tensor);
}

ElementType element_type_of(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::Float) return ElementType::float32;
  return type == ScalarType::BFloat16 ? ElementType::bfloat16 : ElementType::float16;
}

AttentionTensor describe(const Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

AttentionBias describe_bias(const Tensor& bias) {
  const auto stride = [&](int64_t dim) { return bias.size(dim) == 1 ? 0 : bias.stride(dim); };
  return {const_cast<void*>(bias.const_data_ptr()), element_type_of(bias), stride(0), stride(1), stride(2)};
}

AttentionMask describe_mask(const Tensor& mask) {
  const auto num_different = [&](int64_t dim) { return mask.stride(dim) == 0 ? 1 : mask.size(dim); };
  return {
      static_cast<const uint8_t*>(mask.const_data_ptr()), num_different(0), num_different(1), mask.stride(0),
      mask.stride(1), mask.stride(2)};
}

}  // namespace lmopt
