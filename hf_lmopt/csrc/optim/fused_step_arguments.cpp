// One optimizer step over many parameters, in place:
//
//   g    = gradient + l2 * parameter
//   step = rule(g, states)                                  and the states are updated
//   step = step * numel / (count + 1) where step * g > 0,   if cautious (Liang et al. 2024,
//          else 0; count is the number of such elements      https://arxiv.org/abs/2411.16085)
//   parameter = (parameter * shrink_before - step) * shrink_after
//
// For n parameters and a rule of K states, state k of parameter i is states[k * n + i]: float32, or uint8 with
// codebooks[k] (256 ascending values) and absmax[k * n + i], the largest magnitude of each 256 elements. Lists that
// no state needs are empty; a state in float32 has an empty tensor in them. All tensors lie on one device, dense. This
// file checks all that but the values of codebooks, and turns tensors into plain pointers.
#include "optim/fused_step_arguments.h"

#include <torch/csrc/stable/ops.h>

#include "optim/rules.h"

namespace lmopt {
namespace {

using torch::stable::Tensor;

struct RuleInfo {
  const char* name;
  size_t num_states;
  size_t num_coefficients;
  bool needs_sums;
};

#define LMOPT_RULE_INFO(name, AnyRule) \
  {#name, LMOPT_INSTRUCTION_SET::AnyRule::num_states, \
   LMOPT_INSTRUCTION_SET::num_coefficients<LMOPT_INSTRUCTION_SET::AnyRule>(), \
   LMOPT_INSTRUCTION_SET::AnyRule::clips_correction},
constexpr RuleInfo kRules[] = {LMOPT_FOR_EACH_RULE(LMOPT_RULE_INFO)};
#undef LMOPT_RULE_INFO

int find_rule(const std::string& name) {
  std::string known;
  for (size_t rule = 0; rule < std::size(kRules); ++rule) {
    if (name == kRules[rule].name) return static_cast<int>(rule);
    known += std::string(rule == 0 ? "" : ", ") + kRules[rule].name;
  }
  STD_TORCH_CHECK(false, "rule='", name, "' is unknown. Known are ", known, ". Correct the name.");
}

int32_t type_of(const Tensor& tensor) {
  int32_t type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &type));
  return type;
}

bool is_float32(const Tensor& tensor) {
  static const int32_t float32 = aoti_torch_dtype_float32();
  return type_of(tensor) == float32;
}

bool is_uint8(const Tensor& tensor) {
  static const int32_t uint8 = aoti_torch_dtype_uint8();
  return type_of(tensor) == uint8;
}

ElementType parameter_type(const Tensor& parameter, size_t i) {
  static const int32_t bfloat16 = aoti_torch_dtype_bfloat16(), float16 = aoti_torch_dtype_float16();
  if (is_float32(parameter)) return ElementType::float32;
  const int32_t type = type_of(parameter);
  STD_TORCH_CHECK(
      type == bfloat16 || type == float16, "parameters[", i, "] has a type that the fused step lacks. It takes ",
      "float32, bfloat16 and float16. Convert the parameter, or use the foreach step.");
  return type == bfloat16 ? ElementType::bfloat16 : ElementType::float16;
}

bool is_beside(const Tensor& tensor, const Tensor& other) {
  int32_t type, other_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(other.get(), &other_type));
  return type == other_type && tensor.get_device_index() == other.get_device_index();
}

// The data of a tensor that must be contiguous, of a given size, and on the device of another.
void* checked_data(const Tensor& tensor, int64_t numel, const Tensor& other, const char* list, size_t i) {
  STD_TORCH_CHECK(
      tensor.numel() == numel, list, "[", i, "] has ", tensor.numel(), " elements. It needs ", numel,
      ", by the parameter it belongs to. Check the order of the lists.");
  STD_TORCH_CHECK(
      tensor.is_contiguous(), list, "[", i, "] is not contiguous. The fused step walks through memory in order. ",
      "Call contiguous(), or use the foreach step.");
  STD_TORCH_CHECK(
      is_beside(tensor, other), list, "[", i, "] is on another device than parameters[0]. All must be on one device. ",
      "Move it there.");
  return const_cast<void*>(tensor.const_data_ptr());
}

void check_length(const char* list, size_t length, size_t wanted, const char* why) {
  STD_TORCH_CHECK(
      length == wanted, list, " has ", length, " entries. ", wanted, " are needed: ", why, ". Check the call.");
}

void check_lengths(const RuleInfo& rule, const FusedStepArguments& arguments) {
  const size_t num_parameters = arguments.parameters.size(), num_states = arguments.states.size();
  check_length("gradients", arguments.gradients.size(), num_parameters, "one per parameter");
  check_length("states", num_states, rule.num_states * num_parameters, "the rule's states per parameter");
  check_length("coefficients", arguments.coefficients.size(), rule.num_coefficients, "as the rule has");
  if (const size_t length = arguments.absmax.size()) {
    check_length("absmax", length, num_states, "one per state tensor, or none at all");
  }
  if (const size_t length = arguments.codebooks.size()) {
    check_length("codebooks", length, rule.num_states, "one per state, or none at all");
  }
}

const float* checked_codebook(const FusedStepArguments& arguments, size_t k) {
  const Tensor& table = arguments.codebooks[k];
  if (table.numel() == 0 || arguments.parameters.empty()) return nullptr;
  STD_TORCH_CHECK(
      is_float32(table), "codebooks[", k, "] is not float32. A table of 256 float32 values is needed. Convert it.");
  return static_cast<const float*>(checked_data(table, 256, arguments.parameters[0], "codebooks", k));
}

void set_state(
    FusedTensor& target, size_t k, size_t index, const float* codebook, const FusedStepArguments& arguments) {
  const Tensor &state = arguments.states[index], &like = arguments.parameters[0];
  target.states[k] = checked_data(state, target.numel, like, "states", index);
  target.absmax[k] = nullptr;
  if (is_float32(state)) return;
  STD_TORCH_CHECK(
      is_uint8(state) && codebook != nullptr && !arguments.absmax.empty(), "states[", index,
      "] is not float32. Other states must be uint8, with codebooks[", k, "] and absmax[", index,
      "]. Convert it, or give these.");
  const Tensor& absmax = arguments.absmax[index];
  STD_TORCH_CHECK(
      is_float32(absmax), "absmax[", index, "] is not float32. One float32 per block is needed. Convert it.");
  target.absmax[k] =
      static_cast<float*>(checked_data(absmax, num_quantized_blocks(target), like, "absmax", index));
}

FusedTensor describe_tensor(const FusedStepArguments& arguments, size_t i, const float* const* codebooks) {
  const Tensor &parameter = arguments.parameters[i], &gradient = arguments.gradients[i];
  FusedTensor tensor{};
  tensor.numel = parameter.numel();
  tensor.parameter = checked_data(parameter, tensor.numel, arguments.parameters[0], "parameters", i);
  tensor.gradient = checked_data(gradient, tensor.numel, arguments.parameters[0], "gradients", i);
  tensor.parameter_type = parameter_type(parameter, i);
  tensor.gradient_type = is_float32(gradient) ? ElementType::float32 : tensor.parameter_type;
  STD_TORCH_CHECK(
      is_float32(gradient) || type_of(gradient) == type_of(parameter), "gradients[", i,
      "] has another type than its parameter. It may have the parameter's or float32. Convert it.");
  const size_t num_parameters = arguments.parameters.size();
  for (size_t k = 0; k * num_parameters < arguments.states.size(); ++k) {
    set_state(tensor, k, k * num_parameters + i, codebooks[k], arguments);
  }
  return tensor;
}

}  // namespace

CheckedFusedStep check_fused_step(const FusedStepArguments& arguments) {
  CheckedFusedStep checked{};
  checked.rule = find_rule(arguments.rule);
  const RuleInfo& rule = kRules[checked.rule];
  check_lengths(rule, arguments);
  checked.needs_sums = arguments.cautious || rule.needs_sums;
  for (size_t k = 0; k < arguments.codebooks.size(); ++k) checked.codebooks[k] = checked_codebook(arguments, k);

  FusedStep& step = checked.step;
  checked.tensors.reserve(arguments.parameters.size());
  for (size_t i = 0; i < arguments.parameters.size(); ++i) {
    checked.tensors.push_back(describe_tensor(arguments, i, checked.codebooks));
    checked.tensors[i].first_block = step.num_blocks;
    step.num_blocks += num_blocks(checked.tensors[i]);
  }
  step.tensors = checked.tensors.data();
  step.num_tensors = static_cast<int64_t>(checked.tensors.size());
  for (size_t c = 0; c < rule.num_coefficients; ++c) {
    step.coefficients[c] = static_cast<float>(arguments.coefficients[c]);
  }
  step.l2 = static_cast<float>(arguments.l2);
  step.shrink_before = static_cast<float>(arguments.shrink_before);
  step.shrink_after = static_cast<float>(arguments.shrink_after);
  step.cautious = arguments.cautious;
  return checked;
}

}  // namespace lmopt
