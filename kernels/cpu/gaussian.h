// The row kernels of gaussian_pack and gaussian_unpack, tables of functions per instruction set and
// row type.
#pragma once

#include <cstdint>

#include "../gaussian_math.cuh"
#include "row_types.h"

namespace moe_comp {

template <typename T>
struct Gaussian {
  // Returns the sum of the squares of `hidden` values, added in the order of ops/gaussian.py.
  double (*sum_of_squares)(const T* values, int64_t hidden);
  // Writes packed_bytes(hidden, num_bits) bytes of codes; indexed by num_bits.
  void (*encode[kMaxGaussianBits + 1])(const T* values, int64_t hidden, float per_unit,
                                       uint8_t* packed);
  // Writes levels[code] for `hidden` codes; indexed by num_bits. There are kMaxLevels of them,
  // whatever the codes. `streaming`: see unpack_dequantize.h.
  void (*decode[kMaxGaussianBits + 1])(const uint8_t* packed, int64_t hidden, const T* levels,
                                       T* values, bool streaming);
};

template <typename T>
const Gaussian<T>& gaussian_generic();
template <typename T>
const Gaussian<T>& gaussian_avx2();
template <typename T>
const Gaussian<T>& gaussian_avx512();

}  // namespace moe_comp
