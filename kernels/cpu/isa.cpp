#include "isa.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <string>

namespace moe_comp {
namespace {

constexpr const char* kVariable = "MEGATRON_MOE_COMP_CPU_ISA";

Isa best_isa() {
#if MMC_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vbmi")) {
    return Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2")) return Isa::kAvx2;
#endif
  return Isa::kGeneric;
}

Isa isa_of(const std::string& name) {
  if (name == "generic") return Isa::kGeneric;
  if (name == "avx2") return Isa::kAvx2;
  TORCH_CHECK_VALUE(name == "avx512", kVariable, "=", name, ": must be avx512, avx2 or generic");
  return Isa::kAvx512;
}

}  // namespace

Isa selected_isa() {
  static const Isa best = best_isa();
  const char* const name = std::getenv(kVariable);
  if (name == nullptr) return best;
  const Isa isa = isa_of(name);
  TORCH_CHECK_VALUE(isa <= best, kVariable, "=", name, ": this machine has no such instructions");
  return isa;
}

}  // namespace moe_comp
