// unpack_dithered in portable C++, a group of eight columns at a time.
#include "packing.h"
#include "unpack_dithered.h"

namespace moe_comp {
namespace {

template <typename T, int kBits>
void decode(const uint8_t* packed, int64_t hidden, uint32_t row, float unit,
            const RandomStream& random, float largest, T* values, bool /*streaming*/) {
  for (int64_t column = 0; column < hidden; column += 8) {
    uint32_t words[4];
    philox4x32(static_cast<uint32_t>(column / 8), row, random.offset, random.stream, random.key,
               words);
    const int num_values = static_cast<int>(std::min<int64_t>(8, hidden - column));
    const uint64_t bit_stream = get_bits(packed, num_values * kBits);
    packed += packed_bytes(num_values, kBits);
    for (int i = 0; i < num_values; ++i) {
      const auto code = static_cast<uint32_t>(bit_stream >> (i * kBits)) & ((1u << kBits) - 1);
      const uint32_t half = words[i / 2] >> (16 * (i % 2)) & 0xffff;
      const float value = dithered_value_of(code, half, unit, kBits);
      values[column + i] = from_float<T>(saturated(value, largest));
    }
  }
}

}  // namespace

template <typename T>
const UnpackDithered<T>& unpack_dithered_generic() {
  static constexpr UnpackDithered<T> kernels = {{nullptr, nullptr, decode<T, 2>, decode<T, 3>,
                                                 decode<T, 4>, decode<T, 5>, decode<T, 6>,
                                                 decode<T, 7>, decode<T, 8>}};
  return kernels;
}

template const UnpackDithered<float>& unpack_dithered_generic();
template const UnpackDithered<Bf16>& unpack_dithered_generic();

}  // namespace moe_comp
