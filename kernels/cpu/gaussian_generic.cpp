// gaussian_pack and gaussian_unpack in portable C++, a group of eight columns at a time.
#include <algorithm>

#include "gaussian.h"
#include "packing.h"

namespace moe_comp {
namespace {

template <typename T>
double sum_of_squares(const T* values, int64_t hidden) {
  double sum = 0.0;
  for (int64_t first = 0; first < hidden; first += kSumColumns) {
    const int64_t num_values = std::min<int64_t>(kSumColumns, hidden - first);
    double lanes[kSumLanes] = {};
    for (int64_t i = 0; i < num_values; ++i) {
      const double x = to_float(values[first + i]);
      lanes[i % kSumLanes] += x * x;
    }
    for (int half = kSumLanes / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    sum += lanes[0];
  }
  return sum;
}

template <typename T, int kBits>
void encode(const T* values, int64_t hidden, float per_unit, uint8_t* packed) {
  constexpr int kHalf = 1 << (kBits - 1);
  for (int64_t column = 0; column < hidden; column += 8) {
    const int num_values = static_cast<int>(std::min<int64_t>(8, hidden - column));
    uint64_t bit_stream = 0;
    for (int i = 0; i < num_values; ++i) {
      const int cell = cell_of(to_float(values[column + i]), per_unit);
      const int index = index_of_cell<kBits>(cell < 0 ? ~cell : cell);
      const int code = cell < 0 ? kHalf - 1 - index : kHalf + index;
      bit_stream |= static_cast<uint64_t>(code) << (i * kBits);
    }
    packed = put_bits(bit_stream, num_values * kBits, packed);
  }
}

template <typename T, int kBits>
void decode(const uint8_t* packed, int64_t hidden, const T* levels, T* values,
            bool /*streaming*/) {
  for (int64_t column = 0; column < hidden; column += 8) {
    const int num_values = static_cast<int>(std::min<int64_t>(8, hidden - column));
    const uint64_t bit_stream = get_bits(packed, num_values * kBits);
    packed += packed_bytes(num_values, kBits);
    for (int i = 0; i < num_values; ++i) {
      values[column + i] = levels[bit_stream >> (i * kBits) & ((1u << kBits) - 1)];
    }
  }
}

}  // namespace

template <typename T>
const Gaussian<T>& gaussian_generic() {
  static constexpr Gaussian<T> kernels = {
      sum_of_squares<T>,
      {nullptr, nullptr, encode<T, 2>, encode<T, 3>, encode<T, 4>},
      {nullptr, nullptr, decode<T, 2>, decode<T, 3>, decode<T, 4>}};
  return kernels;
}

template const Gaussian<float>& gaussian_generic();
template const Gaussian<Bf16>& gaussian_generic();

}  // namespace moe_comp
