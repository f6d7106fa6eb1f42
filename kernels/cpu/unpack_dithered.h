// The row kernels of unpack_dithered, one table of functions per instruction set and row type.
#pragma once

#include <cstdint>

#include "philox.h"
#include "row_types.h"

namespace moe_comp {

template <typename T>
struct UnpackDithered {
  // Writes `hidden` values from packed_bytes(hidden, num_bits) bytes of codes; indexed by num_bits.
  // `row` is their number in the random stream, `unit` the step over kOne. The values are finite;
  // only the portable kernel knows NaN, and makes what is beyond `largest` that. `streaming`: see
  // unpack_dequantize.h.
  void (*decode[kMaxBits + 1])(const uint8_t* packed, int64_t hidden, uint32_t row, float unit,
                               const RandomStream& random, float largest, T* values,
                               bool streaming);
};

template <typename T>
const UnpackDithered<T>& unpack_dithered_generic();
template <typename T>
const UnpackDithered<T>& unpack_dithered_avx2();
template <typename T>
const UnpackDithered<T>& unpack_dithered_avx512();

}  // namespace moe_comp
