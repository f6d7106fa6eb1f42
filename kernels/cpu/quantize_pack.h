// The row kernels of quantize_pack, one table of functions per instruction set and row type.
#pragma once

#include <cstdint>

#include "philox.h"
#include "row_types.h"

namespace moe_comp {

template <typename T>
struct QuantizePack {
  // Returns the largest magnitude of `hidden` values, as the bits of a float32.
  uint32_t (*absmax_bits)(const T* values, int64_t hidden);
  // Writes packed_bytes(hidden, num_bits) bytes of codes; indexed by num_bits. `inverse` is that of
  // a usable scale, `top` the outermost level.
  void (*encode[kMaxBits + 1])(const T* values, int64_t hidden, uint32_t row, float inverse,
                               float top, const RandomStream& random, uint8_t* packed);
};

template <typename T>
const QuantizePack<T>& quantize_pack_generic();
template <typename T>
const QuantizePack<T>& quantize_pack_avx2();
template <typename T>
const QuantizePack<T>& quantize_pack_avx512();

}  // namespace moe_comp
