// cast_pack and unpack_cast with AVX2.
#include "isa.h"
#if MMC_X86

#define MMC_TARGET __attribute__((target("avx2")))

namespace moe_comp {
namespace {
constexpr int kLanes = 8;
}
}  // namespace moe_comp

#include "cast_pack_rows.h"

namespace moe_comp {

const CastPack& cast_pack_avx2(CastRows rows) { return kCastPack[rows]; }

}  // namespace moe_comp

#endif  // MMC_X86
