#include "cuda/attention/prepared_call.h"

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <string>

#include "cuda/attention/shapes.h"
#include "cuda/device.h"

namespace lmopt {
namespace cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxHeadSize = kHeadSizes[sizeof(kHeadSizes) / sizeof(kHeadSizes[0]) - 1];

constexpr int kInsufficientDriver = 35;  // cudaErrorInsufficientDriver

bool is_multiple(int64_t number, int64_t of) { return number % of == 0; }

}  // namespace

void check_launch(int error, const char* what) {
  STD_TORCH_CHECK(
      error != kInsufficientDriver, "NVIDIA's driver is older than the CUDA toolkit that this extension was built with. ",
      "A driver serves toolkits up to its own version, which nvidia-smi shows. Update the driver, or build with an older ",
      "nvcc on the PATH.");
  STD_TORCH_CHECK(
      error == 0, what, " failed: ", describe_error(error), ". Look at the kernels that ran before it with ",
      "CUDA_LAUNCH_BLOCKING=1; for 'no kernel image' build for this card with HF_LMOPT_CUDA_ARCHS.");
}

DeviceTensor describe_on_device(const Tensor& tensor) {
  AttentionTensor plain = describe(tensor);
  // The stride of a dimension of size 1 is never taken.
  if (tensor.size(0) == 1) plain.batch_stride = 0;
  if (tensor.size(1) == 1) plain.head_stride = 0;
  if (tensor.size(2) == 1) plain.row_stride = 0;
  const bool is_aligned = is_multiple(reinterpret_cast<intptr_t>(plain.data), 16) && is_multiple(tensor.size(3), 8) &&
      is_multiple(plain.batch_stride, 8) && is_multiple(plain.head_stride, 8) && is_multiple(plain.row_stride, 8);
  return {plain.data, plain.batch_stride, plain.head_stride, plain.row_stride, is_aligned};
}

Tensor make_rows_dense_on_device(const Tensor& tensor) {
  return has_dense_rows(tensor) ? tensor : make_contiguous_on_device(tensor, tensor.scalar_type());
}

Tensor new_projection(const Tensor& like) {
  const int64_t num_heads = like.size(1), length = like.size(2), head_size = like.size(3);
  const int64_t row = num_heads * head_size;
  return new_device_tensor(
      {like.size(0), num_heads, length, head_size}, {std::max<int64_t>(length, 1) * row, head_size, row, 1},
      like.scalar_type(), like);
}

Tensor new_contiguous(const std::vector<int64_t>& sizes, ScalarType type, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t dim = sizes.size(); dim-- > 1;) strides[dim - 1] = strides[dim] * std::max<int64_t>(sizes[dim], 1);
  return new_device_tensor(sizes, strides, type, like);
}

PreparedCall::PreparedCall(AttentionArguments arguments, void* stream) : arguments_(std::move(arguments)) {
  check_launch(find_card(card_), "Asking the CUDA runtime for the card");
  check_card();
  AttentionArguments& a = arguments_;
  a.query = make_rows_dense_on_device(a.query);
  a.key = make_rows_dense_on_device(a.key);
  a.value = make_rows_dense_on_device(a.value);
  call_.type = element_type_of(a.query);
  call_.batch_size = static_cast<int32_t>(a.batch_size());
  call_.num_heads = static_cast<int32_t>(a.num_heads());
  call_.num_key_heads = static_cast<int32_t>(a.num_key_heads());
  call_.num_queries = static_cast<int32_t>(a.num_queries());
  call_.num_keys = static_cast<int32_t>(a.num_keys());
  call_.head_size = static_cast<int32_t>(a.head_size());
  call_.query = describe_on_device(a.query);
  call_.key = describe_on_device(a.key);
  call_.value = describe_on_device(a.value);
  if (a.bias) {
    a.bias = make_rows_dense_on_device(*a.bias);
    const AttentionBias bias = describe_bias(*a.bias);
    call_.bias = {bias.data, bias.type, bias.batch_stride, bias.head_stride, bias.row_stride};
  }
  if (a.sinks) {
    a.sinks = make_contiguous_on_device(*a.sinks, ScalarType::Float);
    call_.sinks = static_cast<const float*>(a.sinks->const_data_ptr());
  }
  call_.scale = a.scale;
  call_.softcap = a.softcap;
  prepare_dropout();
  prepare_visibility(stream);
}

void PreparedCall::check_card() const {
  const ScalarType type = arguments_.query.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Half || type == ScalarType::BFloat16, "query is of type float32 on a GPU. There the compiled ",
      "attention multiplies float16 and bfloat16 alone. Train under autocast (fp16=True or bf16=True), or use ",
      "attn_implementation='sdpa'.");
  const int major = card_.compute_capability / 10, minor = card_.compute_capability % 10;
  const auto capability = std::to_string(major) + "." + std::to_string(minor);
  STD_TORCH_CHECK(
      type == ScalarType::Half || card_.generation() != Generation::turing, "query is of type bfloat16, on a GPU of ",
      "compute capability ", capability, " that runs code for Turing. Its tensor cores multiply float16 alone. Train ",
      "with fp16=True, or use attn_implementation='sdpa'.");
  STD_TORCH_CHECK(
      card_.compute_capability >= 75, "The GPU has compute capability ", capability, ". The compiled attention needs ",
      "7.5 (Turing) or newer: use attn_implementation='sdpa'.");
  STD_TORCH_CHECK(
      arguments_.head_size() <= kMaxHeadSize, "query has a head size of ", arguments_.head_size(), ". On a GPU the ",
      "compiled attention takes heads of up to ", kMaxHeadSize, ": use attn_implementation='sdpa'.");
}

DeviceCall PreparedCall::with_results(const Tensor& output, const Tensor& logsumexp) const {
  DeviceCall call = call_;
  call.output = describe_on_device(output);
  call.logsumexp = static_cast<float*>(const_cast<void*>(logsumexp.const_data_ptr()));
  return call;
}

void PreparedCall::prepare_dropout() {
  const AttentionArguments& a = arguments_;
  if (a.dropout_p == 0) return;
  // floor(p 2^32), as in the reference; p < 1, so it fits.
  call_.dropout.threshold = static_cast<uint32_t>(a.dropout_p * 4294967296.0);
  call_.dropout.kept_scale = static_cast<float>(1 / (1 - a.dropout_p));
  const auto* seed = static_cast<const uint64_t*>(a.dropout_seed->const_data_ptr());
  // On a device it stays there, so that nothing waits.
  if (is_on_same_device(*a.dropout_seed, a.query)) {
    call_.dropout.seed = seed;
  } else {
    call_.dropout.seed_on_host = *seed;
  }
}

template <class T>
T* PreparedCall::allocate(int64_t count) {
  const auto num_bytes = count * static_cast<int64_t>(sizeof(T));
  workspaces_.push_back(new_contiguous({num_bytes}, ScalarType::Byte, arguments_.query));
  return static_cast<T*>(const_cast<void*>(workspaces_.back().const_data_ptr()));
}

void PreparedCall::prepare_visibility(void* stream) {
  AttentionArguments& a = arguments_;
  call_.visibility.num_queries = a.num_queries();
  call_.visibility.num_keys = a.num_keys();
  call_.visibility.map.batch_size = call_.visibility.map.num_heads = call_.visibility.seen_key_heads = 1;
  if (a.num_queries() == 0 || a.num_keys() == 0) return;
  VisibilityRules rules{};
  rules.num_queries = static_cast<int32_t>(a.num_queries());
  rules.num_keys = static_cast<int32_t>(a.num_keys());
  rules.is_causal = a.is_causal;
  rules.window_left = a.window_left;
  rules.window_right = a.window_right;
  if (a.cu_seqlens_q) {
    a.cu_seqlens_q = make_contiguous_on_device(*a.cu_seqlens_q, ScalarType::Int);
    a.cu_seqlens_k = make_contiguous_on_device(*a.cu_seqlens_k, ScalarType::Int);
    rules.query_boundaries = static_cast<const int32_t*>(a.cu_seqlens_q->const_data_ptr());
    rules.key_boundaries = static_cast<const int32_t*>(a.cu_seqlens_k->const_data_ptr());
    rules.num_documents = static_cast<int32_t>(a.cu_seqlens_q->numel() - 1);
  }
  if (a.mask) {
    prepare_map(rules, stream);
  } else if (rules.is_causal || rules.window_left >= 0 || rules.window_right >= 0 || a.cu_seqlens_q) {
    prepare_intervals(rules, stream);
  }
}

void PreparedCall::prepare_intervals(const VisibilityRules& rules, void* stream) {
  IntervalResults results{};
  results.first_key = allocate<int32_t>(rules.num_queries);
  results.end_key = allocate<int32_t>(rules.num_queries);
  results.blocks = allocate<BlockInterval>(num_attention_blocks(rules.num_queries));
  // Else each key is seen by the last query.
  const bool may_hide_keys = rules.window_left >= 0 || rules.query_boundaries != nullptr;
  if (may_hide_keys) results.is_key_seen = allocate<uint8_t>(rules.num_keys);
  check_launch(build_intervals(rules, results, stream), "Building the intervals of keys that queries see");
  call_.visibility.first_key = results.first_key;
  call_.visibility.end_key = results.end_key;
  call_.visibility.is_key_seen = results.is_key_seen;
  call_.block_intervals = results.blocks;
}

void PreparedCall::prepare_map(const VisibilityRules& rules, void* stream) {
  arguments_.mask = make_rows_dense_on_device(*arguments_.mask);
  const AttentionMask plain = describe_mask(*arguments_.mask);
  const DeviceMask mask{
      plain.data, static_cast<int32_t>(plain.batch_size), static_cast<int32_t>(plain.num_heads), plain.batch_stride,
      plain.head_stride, plain.row_stride};
  const int64_t num_entries = plain.batch_size * plain.num_heads;
  const int64_t num_blocks =
      num_entries * num_attention_blocks(rules.num_queries) * num_attention_blocks(rules.num_keys);
  MapResults results{};
  results.seen_key_heads = mask.num_heads == 1 ? 1 : call_.num_key_heads;
  results.states = allocate<BlockState>(num_blocks);
  results.words = allocate<uint64_t>(num_blocks * kAttentionBlock);
  results.is_key_seen = allocate<uint8_t>(plain.batch_size * results.seen_key_heads * rules.num_keys);
  results.does_query_see = allocate<uint8_t>(num_entries * rules.num_queries);
  check_launch(build_map(mask, rules, results, stream), "Mapping the mask by blocks");
  call_.visibility.map = {results.states, results.words, mask.batch_size, mask.num_heads};
  call_.visibility.is_key_seen = results.is_key_seen;
  call_.visibility.does_query_see = results.does_query_see;
  call_.visibility.seen_key_heads = results.seen_key_heads;
}

}  // namespace cuda
}  // namespace lmopt
