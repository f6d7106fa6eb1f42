// unpack_dequantize with AVX2: a group of eight columns at a time.
#include "isa.h"
#if MMC_X86

#include <algorithm>

#include "avx2.h"
#include "unpack_dequantize.h"

namespace moe_comp {
namespace {

template <int kBits>
MMC_TARGET_INLINE __m256 dequantize(uint64_t octets, float step) {
  const __m256i codes = unpack<kBits>(_mm256_set1_epi64x(static_cast<int64_t>(octets)));
  const __m256i signed_codes = _mm256_sub_epi32(codes, _mm256_set1_epi32(levels(kBits)));
  return _mm256_mul_ps(_mm256_cvtepi32_ps(signed_codes), _mm256_set1_ps(step));
}

template <typename T, int kBits>
MMC_TARGET void decode(const uint8_t* packed, int64_t hidden, float step, T* values,
                       bool /*streaming*/) {
  const uint8_t* const end = packed + packed_bytes(hidden, kBits);
  int64_t column = 0;
  for (; column + 8 <= hidden && end - packed >= 8; column += 8) {
    uint64_t octets;
    std::memcpy(&octets, packed, 8);
    store(dequantize<kBits>(octets, step), values + column);
    packed += kBits;
  }
  // The last groups, behind which there are fewer than eight bytes to read.
  for (; column < hidden; column += 8) {
    const int64_t num_values = std::min<int64_t>(8, hidden - column);
    uint64_t octets = 0;
    std::memcpy(&octets, packed, packed_bytes(num_values, kBits));
    T group[8];
    store(dequantize<kBits>(octets, step), group);
    std::memcpy(values + column, group, num_values * sizeof(T));
    packed += kBits;
  }
}

}  // namespace

template <typename T>
const UnpackDequantize<T>& unpack_dequantize_avx2() {
  static constexpr UnpackDequantize<T> kernels = {{nullptr, nullptr, decode<T, 2>, decode<T, 3>,
                                                   decode<T, 4>, decode<T, 5>, decode<T, 6>,
                                                   decode<T, 7>, decode<T, 8>}};
  return kernels;
}

template const UnpackDequantize<float>& unpack_dequantize_avx2();
template const UnpackDequantize<Bf16>& unpack_dequantize_avx2();

}  // namespace moe_comp

#endif  // MMC_X86
