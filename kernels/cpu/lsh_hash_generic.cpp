// hadamard_hash and dense_hash in portable C++, for which a compiler has vectors of four lanes.
#define MMC_TARGET

namespace moe_comp {
namespace {
constexpr int kLanes = 4;
}
}  // namespace moe_comp

#include "lsh_hash_rows.h"

namespace moe_comp {

template <typename T>
const LshHash<T>& lsh_hash_generic() {
  return kLshHash<T>;
}

template const LshHash<float>& lsh_hash_generic();
template const LshHash<Bf16>& lsh_hash_generic();

}  // namespace moe_comp
