// hadamard_hash and dense_hash with AVX-512.
#include "isa.h"
#if MMC_X86

#define MMC_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")))

namespace moe_comp {
namespace {
constexpr int kLanes = 16;
}
}  // namespace moe_comp

#include "lsh_hash_rows.h"

namespace moe_comp {

template <typename T>
const LshHash<T>& lsh_hash_avx512() {
  return kLshHash<T>;
}

template const LshHash<float>& lsh_hash_avx512();
template const LshHash<Bf16>& lsh_hash_avx512();

}  // namespace moe_comp

#endif  // MMC_X86
