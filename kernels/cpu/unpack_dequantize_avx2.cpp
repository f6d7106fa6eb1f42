// unpack_dequantize with AVX2: a group of eight columns at a time.
#include "isa.h"
#if MMC_X86

#include <immintrin.h>

#include <algorithm>

#include "lanes.h"
#include "unpack_dequantize.h"

#define MMC_TARGET __attribute__((target("avx2")))
#define MMC_TARGET_INLINE MMC_TARGET __attribute__((always_inline)) inline

namespace moe_comp {
namespace {

constexpr int kColumns = 8;

struct alignas(32) Shifts {
  uint32_t of[kColumns];
};

template <int kBits>
constexpr Shifts code_shifts() {
  Shifts shifts{};
  for (int i = 0; i < kColumns; ++i) shifts.of[i] = i * kBits % 8;
  return shifts;
}

// The eight codes in the first b bytes of both halves of `lanes`, a 32-bit lane each.
template <int kBits>
MMC_TARGET_INLINE __m256i unpack(__m256i lanes) {
  // The two bytes that hold code i to lane i; what is above them does not matter.
  static constexpr auto kBytes = byte_index<32>([](int i) { return i / 4 * kBits / 8 + i % 2; });
  static constexpr Shifts kShifts = code_shifts<kBits>();
  const __m256i bytes =
      _mm256_shuffle_epi8(lanes, _mm256_load_si256(reinterpret_cast<const __m256i*>(kBytes.of)));
  const __m256i codes =
      _mm256_srlv_epi32(bytes, _mm256_load_si256(reinterpret_cast<const __m256i*>(kShifts.of)));
  return _mm256_and_si256(codes, _mm256_set1_epi32((1 << kBits) - 1));
}

MMC_TARGET_INLINE void store(__m256 x, float* values) { _mm256_storeu_ps(values, x); }

MMC_TARGET_INLINE void store(__m256 x, Bf16* values) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i upper = _mm256_srli_epi32(rounded, 16);
  const __m128i row =
      _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(upper, upper), 0xd8));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(values), row);
}

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
  for (; column + kColumns <= hidden && end - packed >= 8; column += kColumns) {
    uint64_t octets;
    std::memcpy(&octets, packed, 8);
    store(dequantize<kBits>(octets, step), values + column);
    packed += kBits;
  }
  // The last groups, behind which there are fewer than eight bytes to read.
  for (; column < hidden; column += kColumns) {
    const int64_t num_values = std::min<int64_t>(kColumns, hidden - column);
    uint64_t octets = 0;
    std::memcpy(&octets, packed, packed_bytes(num_values, kBits));
    T group[kColumns];
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
