// The row kernels of cast_pack and unpack_cast, one table of functions per instruction set.
#pragma once

#include <cstdint>

namespace moe_comp {

enum CastFormat { kToBf16, kToFp16, kToFp8, kToMxFp8, kNumCastFormats };
enum CastRows { kFloat32Rows, kBfloat16Rows, kFloat16Rows, kNumCastRows };

// One row, whose parts may begin at any byte; a format without scales does not use them.
struct CastPack {
  void (*encode[kNumCastFormats])(const void* values, int64_t hidden, uint8_t* numbers,
                                  uint8_t* scales);
  void (*decode[kNumCastFormats])(const uint8_t* numbers, const uint8_t* scales, int64_t hidden,
                                  void* values);
};

const CastPack& cast_pack_generic(CastRows rows);
const CastPack& cast_pack_avx2(CastRows rows);
const CastPack& cast_pack_avx512(CastRows rows);

}  // namespace moe_comp
