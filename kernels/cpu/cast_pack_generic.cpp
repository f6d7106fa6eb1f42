// cast_pack and unpack_cast in portable C++, for which a compiler has vectors of four lanes.
#define MMC_TARGET

namespace moe_comp {
namespace {
constexpr int kLanes = 4;
}
}  // namespace moe_comp

#include "cast_pack_rows.h"

namespace moe_comp {

const CastPack& cast_pack_generic(CastRows rows) { return kCastPack[rows]; }

}  // namespace moe_comp
