// The instruction sets that the C++ kernels are written for, chosen when they run.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define MMC_X86 1
#else
#define MMC_X86 0
#endif

namespace moe_comp {

enum class Isa { kGeneric, kAvx2, kAvx512 };

// The best instruction set of this machine, or the lower one that the environment variable
// MEGATRON_MOE_COMP_CPU_ISA names. Throws a ValueError for an unknown or unavailable one.
Isa selected_isa();

}  // namespace moe_comp
