// quantize_pack in portable C++, a group of eight columns at a time.
#include <algorithm>

#include "packing.h"
#include "quantize_pack.h"

namespace moe_comp {
namespace {

template <typename T, int kBits>
void encode(const T* values, int64_t hidden, uint32_t row, float inverse, float top,
            const RandomStream& random, uint8_t* packed) {
  for (int64_t column = 0; column < hidden; column += 8) {
    uint32_t words[4];
    philox4x32(static_cast<uint32_t>(column / 8), row, random.offset, random.stream, random.key,
               words);
    const int num_values = static_cast<int>(std::min<int64_t>(8, hidden - column));
    uint64_t bit_stream = 0;
    for (int i = 0; i < num_values; ++i) {
      const uint32_t half = words[i / 2] >> (16 * (i % 2)) & 0xffff;
      const uint64_t code = code_of(to_float(values[column + i]), inverse, top, half);
      bit_stream |= code << (i * kBits);
    }
    packed = put_bits(bit_stream, num_values * kBits, packed);
  }
}

template <typename T>
uint32_t absmax_bits(const T* values, int64_t hidden) {
  uint32_t bits = 0;
  for (int64_t i = 0; i < hidden; ++i) bits = std::max(bits, magnitude_bits(values[i]));
  return bits;
}

}  // namespace

template <typename T>
const QuantizePack<T>& quantize_pack_generic() {
  static constexpr QuantizePack<T> kernels = {
      absmax_bits<T>,
      {nullptr, nullptr, encode<T, 2>, encode<T, 3>, encode<T, 4>, encode<T, 5>, encode<T, 6>,
       encode<T, 7>, encode<T, 8>}};
  return kernels;
}

template const QuantizePack<float>& quantize_pack_generic();
template const QuantizePack<Bf16>& quantize_pack_generic();

}  // namespace moe_comp
