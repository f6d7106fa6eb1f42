// hadamard_hash and dense_hash with AVX2.
#include "isa.h"
#if MMC_X86

#define MMC_TARGET __attribute__((target("avx2")))

namespace moe_comp {
namespace {
constexpr int kLanes = 8;
}
}  // namespace moe_comp

#include "lsh_hash_rows.h"

namespace moe_comp {

template <typename T>
const LshHash<T>& lsh_hash_avx2() {
  return kLshHash<T>;
}

template const LshHash<float>& lsh_hash_avx2();
template const LshHash<Bf16>& lsh_hash_avx2();

}  // namespace moe_comp

#endif  // MMC_X86
