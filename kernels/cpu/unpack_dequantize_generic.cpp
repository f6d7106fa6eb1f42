// unpack_dequantize in portable C++, a group of eight columns at a time.
#include <algorithm>

#include "packing.h"
#include "unpack_dequantize.h"

namespace moe_comp {
namespace {

template <typename T, int kBits>
void decode(const uint8_t* packed, int64_t hidden, float step, T* values, bool /*streaming*/) {
  for (int64_t column = 0; column < hidden; column += 8) {
    const int num_values = static_cast<int>(std::min<int64_t>(8, hidden - column));
    const uint64_t bit_stream = get_bits(packed, num_values * kBits);
    packed += packed_bytes(num_values, kBits);
    for (int i = 0; i < num_values; ++i) {
      const auto code = static_cast<uint32_t>(bit_stream >> (i * kBits)) & ((1u << kBits) - 1);
      values[column + i] = from_float<T>(value_of(code, step, kBits));
    }
  }
}

}  // namespace

template <typename T>
const UnpackDequantize<T>& unpack_dequantize_generic() {
  static constexpr UnpackDequantize<T> kernels = {{nullptr, nullptr, decode<T, 2>, decode<T, 3>,
                                                   decode<T, 4>, decode<T, 5>, decode<T, 6>,
                                                   decode<T, 7>, decode<T, 8>}};
  return kernels;
}

template const UnpackDequantize<float>& unpack_dequantize_generic();
template const UnpackDequantize<Bf16>& unpack_dequantize_generic();

}  // namespace moe_comp
