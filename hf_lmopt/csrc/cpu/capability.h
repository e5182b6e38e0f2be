// Instruction sets of the CPU kernels, and the choice among them at run time.
//
// A kernel file in this folder is compiled once per instruction set, each time in the namespace
// lmopt::LMOPT_INSTRUCTION_SET. Such a file must include no torch header and no container of the standard library:
// their inline functions would be compiled with AVX-512 under a name that the linker shares with everyone. Kernels
// take plain pointers, and run in parallel through parallel.h.
#pragma once

#if defined(__x86_64__)
// Declares a kernel in the namespace of every instruction set.
#define LMOPT_DECLARE_CPU_KERNEL(declaration) \
  namespace portable {                        \
  declaration;                                \
  }                                           \
  namespace avx2 {                            \
  declaration;                                \
  }                                           \
  namespace avx512 {                          \
  declaration;                                \
  }
// The kernel for this processor, a pointer to a function.
#define LMOPT_CHOOSE_CPU_KERNEL(name) \
  ::lmopt::choose_by_capability(&::lmopt::portable::name, &::lmopt::avx2::name, &::lmopt::avx512::name)
#else
#define LMOPT_DECLARE_CPU_KERNEL(declaration) \
  namespace portable {                        \
  declaration;                                \
  }
#define LMOPT_CHOOSE_CPU_KERNEL(name) (&::lmopt::portable::name)
#endif

namespace lmopt {

enum class CpuCapability { portable, avx2, avx512, avx512_bf16 };

// The best instruction set that the processor has, or the lower one that HF_LMOPT_CPU_CAPABILITY names; throws if that
// variable names none or one that is missing. Decided once per process.
CpuCapability cpu_capability();

const char* cpu_capability_name(CpuCapability capability);

// Whether kernels of files named *_avx512_bf16.cpp may run, which have bfloat16 products; all others are avx512's then.
bool cpu_has_avx512_bf16();

template <class Kernel>
Kernel* choose_by_capability(Kernel* portable, Kernel* avx2, Kernel* avx512) {
  switch (cpu_capability()) {
    case CpuCapability::avx512_bf16:
    case CpuCapability::avx512:
      return avx512;
    case CpuCapability::avx2:
      return avx2;
    default:
      return portable;
  }
}

}  // namespace lmopt
