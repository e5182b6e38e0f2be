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
// no state needs are empty; a state in float32 has an empty tensor in them. This file checks all that, and hands plain
// pointers to a kernel.
#include "optim/fused_step_op.h"

#include <torch/csrc/stable/ops.h>

#include "optim/codebook.h"
#include "optim/fused_step.h"
#include "optim/rules.h"

namespace lmopt {
namespace {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

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

// The data of a tensor that must be contiguous, on the CPU, and of a given size.
void* checked_data(const Tensor& tensor, int64_t numel, const char* list, size_t i) {
  STD_TORCH_CHECK(
      tensor.numel() == numel, list, "[", i, "] has ", tensor.numel(), " elements. It needs ", numel,
      ", by the parameter it belongs to. Check the order of the lists.");
  STD_TORCH_CHECK(
      tensor.is_contiguous(), list, "[", i, "] is not contiguous. The fused step walks through memory in order. ",
      "Call contiguous(), or use the foreach step.");
  STD_TORCH_CHECK(
      tensor.is_cpu(), list, "[", i, "] is not on the CPU, but others of the call are. All must be on one device. Move ",
      "it there.");
  return const_cast<void*>(tensor.const_data_ptr());
}

void check_length(const char* list, size_t length, size_t wanted, const char* why) {
  STD_TORCH_CHECK(
      length == wanted, list, " has ", length, " entries. ", wanted, " are needed: ", why, ". Check the call.");
}

void check_lengths(
    const RuleInfo& rule, const Tensors& parameters, const Tensors& gradients, const Tensors& states,
    const Tensors& absmax, const Tensors& codebooks, const std::vector<double>& coefficients) {
  check_length("gradients", gradients.size(), parameters.size(), "one per parameter");
  check_length("states", states.size(), rule.num_states * parameters.size(), "the rule's states per parameter");
  check_length("coefficients", coefficients.size(), rule.num_coefficients, "as the rule has");
  if (!absmax.empty()) check_length("absmax", absmax.size(), states.size(), "one per state tensor, or none at all");
  if (!codebooks.empty()) check_length("codebooks", codebooks.size(), rule.num_states, "one per state, or none at all");
}

std::vector<Codebook> prepare_codebooks(const Tensors& tables) {
  std::vector<Codebook> codebooks;
  codebooks.reserve(tables.size());  // kernels point into it
  for (size_t k = 0; k < tables.size(); ++k) {
    if (tables[k].numel() == 0) {
      codebooks.emplace_back();
      continue;
    }
    STD_TORCH_CHECK(
        is_float32(tables[k]), "codebooks[", k, "] is not float32. A table of 256 float32 values is needed. ",
        "Convert it.");
    codebooks.emplace_back(static_cast<const float*>(checked_data(tables[k], 256, "codebooks", k)));
    STD_TORCH_CHECK(
        codebooks.back().is_valid, "codebooks[", k, "] does not ascend within [-1, 1]. Nearest entries are searched ",
        "by their order. Sort it and divide it by its largest magnitude.");
  }
  return codebooks;
}

void set_state(
    FusedTensor& target, size_t k, size_t index, const Tensor& state, const Tensors& absmax,
    const std::vector<Codebook>& codebooks) {
  target.states[k] = checked_data(state, target.numel, "states", index);
  target.absmax[k] = nullptr;
  if (is_float32(state)) return;
  STD_TORCH_CHECK(
      is_uint8(state) && k < codebooks.size() && codebooks[k].is_valid && !absmax.empty(), "states[", index,
      "] is not float32. Other states must be uint8, with codebooks[", k, "] and absmax[", index,
      "]. Convert it, or give these.");
  STD_TORCH_CHECK(
      is_float32(absmax[index]), "absmax[", index, "] is not float32. One float32 per block is needed. Convert it.");
  target.absmax[k] = static_cast<float*>(checked_data(absmax[index], num_quantized_blocks(target), "absmax", index));
}

std::vector<FusedTensor> describe_tensors(
    const Tensors& parameters, const Tensors& gradients, const Tensors& states, const Tensors& absmax,
    const std::vector<Codebook>& codebooks) {
  std::vector<FusedTensor> tensors(parameters.size());
  int64_t first_block = 0;
  for (size_t i = 0; i < parameters.size(); ++i) {
    FusedTensor& tensor = tensors[i];
    tensor.numel = parameters[i].numel();
    tensor.first_block = first_block;
    first_block += num_blocks(tensor);
    tensor.parameter = checked_data(parameters[i], tensor.numel, "parameters", i);
    tensor.gradient = checked_data(gradients[i], tensor.numel, "gradients", i);
    tensor.parameter_type = parameter_type(parameters[i], i);
    tensor.gradient_type = is_float32(gradients[i]) ? ElementType::float32 : tensor.parameter_type;
    STD_TORCH_CHECK(
        is_float32(gradients[i]) || type_of(gradients[i]) == type_of(parameters[i]), "gradients[", i,
        "] has another type than its parameter. It may have the parameter's or float32. Convert it.");
    for (size_t k = 0; k * parameters.size() < states.size(); ++k) {
      const size_t index = k * parameters.size() + i;
      set_state(tensor, k, index, states[index], absmax, codebooks);
    }
  }
  return tensors;
}

}  // namespace

void fused_step_cpu(
    std::string rule,
    Tensors parameters,
    Tensors gradients,
    Tensors states,
    Tensors absmax,
    Tensors codebooks,
    std::vector<double> coefficients,
    double l2,
    double shrink_before,
    double shrink_after,
    bool cautious) {
  const int rule_number = find_rule(rule);
  check_lengths(kRules[rule_number], parameters, gradients, states, absmax, codebooks, coefficients);
  const std::vector<Codebook> prepared = prepare_codebooks(codebooks);
  std::vector<FusedTensor> tensors = describe_tensors(parameters, gradients, states, absmax, prepared);

  FusedStep step{};
  step.tensors = tensors.data();
  step.num_tensors = static_cast<int64_t>(tensors.size());
  for (const FusedTensor& tensor : tensors) step.num_blocks += num_blocks(tensor);
  for (size_t k = 0; k < prepared.size(); ++k) step.codebooks[k] = &prepared[k];
  std::vector<double> block_sums;
  if (cautious || kRules[rule_number].needs_sums) block_sums.resize(static_cast<size_t>(step.num_blocks));
  step.block_sums = block_sums.data();
  for (size_t c = 0; c < coefficients.size(); ++c) step.coefficients[c] = static_cast<float>(coefficients[c]);
  step.l2 = static_cast<float>(l2);
  step.shrink_before = static_cast<float>(shrink_before);
  step.shrink_after = static_cast<float>(shrink_after);
  step.cautious = cautious;
  if (step.num_blocks > 0) LMOPT_CHOOSE_CPU_KERNEL(fused_step)(rule_number, step);
}

}  // namespace lmopt
