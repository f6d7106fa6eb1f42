// The row kernels of unpack_dequantize, one table of functions per instruction set and row type.
#pragma once

#include <cstdint>

#include "../quantize_math.cuh"
#include "row_types.h"

namespace moe_comp {

template <typename T>
struct UnpackDequantize {
  // Writes `hidden` values from packed_bytes(hidden, num_bits) bytes of codes; indexed by num_bits.
  // `step` is `step_of` the row's scale. `streaming` lets the stores bypass the caches where the
  // instruction set can; then `values` and the bytes of a row are multiples of 64.
  void (*decode[kMaxBits + 1])(const uint8_t* packed, int64_t hidden, float step, T* values,
                               bool streaming);
};

template <typename T>
const UnpackDequantize<T>& unpack_dequantize_generic();
template <typename T>
const UnpackDequantize<T>& unpack_dequantize_avx2();
template <typename T>
const UnpackDequantize<T>& unpack_dequantize_avx512();

}  // namespace moe_comp
