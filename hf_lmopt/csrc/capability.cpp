// What the processor has, and what the user asks for.
#include "cpu/capability.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

namespace lmopt {
namespace {

constexpr CpuCapability kCapabilities[] = {
    CpuCapability::portable, CpuCapability::avx2, CpuCapability::avx512, CpuCapability::avx512_bf16};

CpuCapability detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // The builtins also ask whether the operating system saves the wide registers.
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx2 && has_avx512) {
    return __builtin_cpu_supports("avx512bf16") ? CpuCapability::avx512_bf16 : CpuCapability::avx512;
  }
  if (has_avx2) return CpuCapability::avx2;
#endif
  return CpuCapability::portable;
}

CpuCapability choose() {
  const CpuCapability best = detect();
  const char* wanted = std::getenv("HF_LMOPT_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (const CpuCapability capability : kCapabilities) {
    if (cpu_capability_name(capability) == std::string(wanted) && capability <= best) return capability;
  }
  STD_TORCH_CHECK(
      false, "HF_LMOPT_CPU_CAPABILITY='", wanted, "' cannot be used: this processor allows portable up to ",
      cpu_capability_name(best), " in the order portable, avx2, avx512, avx512_bf16. Name one of these, or unset it.");
}

}  // namespace

CpuCapability cpu_capability() {
  static const CpuCapability capability = choose();
  return capability;
}

const char* cpu_capability_name(CpuCapability capability) {
  switch (capability) {
    case CpuCapability::avx512_bf16:
      return "avx512_bf16";
    case CpuCapability::avx512:
      return "avx512";
    case CpuCapability::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

bool cpu_has_avx512_bf16() {
  return cpu_capability() == CpuCapability::avx512_bf16;
}

}  // namespace lmopt
