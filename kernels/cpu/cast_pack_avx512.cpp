// cast_pack and unpack_cast with AVX-512.
#include "isa.h"
#if MMC_X86

#define MMC_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")))

namespace moe_comp {
namespace {
constexpr int kLanes = 16;
}
}  // namespace moe_comp

#include "cast_pack_rows.h"

namespace moe_comp {

const CastPack& cast_pack_avx512(CastRows rows) { return kCastPack[rows]; }

}  // namespace moe_comp

#endif  // MMC_X86
