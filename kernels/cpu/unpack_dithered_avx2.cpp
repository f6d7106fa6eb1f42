// unpack_dithered with AVX2: 32 columns, which are four Philox calls, at a time.
#include "isa.h"
#if MMC_X86

#include <algorithm>

#include "avx2.h"
#include "unpack_dithered.h"

namespace moe_comp {
namespace {

alignas(32) constexpr uint64_t kGroupOfLane[kGroups] = {0, 1, 2, 3};

// The random halves of four groups of columns, a 32-bit lane each.
MMC_TARGET_INLINE void spread_halves(Words words, __m256i (&halves)[kGroups]) {
  const __m256i zero = _mm256_setzero_si256();
  const __m256i groups01 = _mm256_permute2x128_si256(words.words01, words.words23, 0x20);
  const __m256i groups23 = _mm256_permute2x128_si256(words.words01, words.words23, 0x31);
  halves[0] = _mm256_unpacklo_epi16(groups01, zero);
  halves[1] = _mm256_unpackhi_epi16(groups01, zero);
  halves[2] = _mm256_unpacklo_epi16(groups23, zero);
  halves[3] = _mm256_unpackhi_epi16(groups23, zero);
}

template <int kBits>
MMC_TARGET_INLINE __m256 dequantize(uint64_t octets, __m256i half, float unit) {
  const __m256i codes = unpack<kBits>(_mm256_set1_epi64x(static_cast<int64_t>(octets)));
  const __m256i origin = _mm256_set1_epi32(-levels(kBits) * 65536);
  const __m256i fixed_point =
      _mm256_sub_epi32(_mm256_add_epi32(_mm256_slli_epi32(codes, 16), origin), half);
  return _mm256_mul_ps(_mm256_cvtepi32_ps(fixed_point), _mm256_set1_ps(unit));
}

// The columns of one block, all of which are there, and eight bytes behind their codes.
template <typename T, int kBits>
MMC_TARGET_INLINE void decode_block(const uint8_t* packed, Words words, float unit, T* values) {
  __m256i halves[kGroups];
  spread_halves(words, halves);
#pragma GCC unroll 4
  for (int i = 0; i < kGroups; ++i) {
    uint64_t octets;
    std::memcpy(&octets, packed + i * kBits, 8);
    store(dequantize<kBits>(octets, halves[i], unit), values + 8 * i);
  }
}

template <typename T, int kBits>
MMC_TARGET void decode(const uint8_t* packed, int64_t hidden, uint32_t row, float unit,
                       const RandomStream& random, float /*largest*/, T* values,
                       bool /*streaming*/) {
  const PhiloxRow philox_row(row, random);
  const uint8_t* const end = packed + packed_bytes(hidden, kBits);
  __m256i groups = load(kGroupOfLane);
  int64_t column = 0;
  for (; column + kBlocks * kColumns <= hidden &&
         end - packed >= kBlocks * kGroups * kBits + 8 - kBits;
       column += kBlocks * kColumns) {
    Words words[kBlocks];
    random_words(groups, philox_row, random, words);
#pragma GCC unroll 4
    for (int i = 0; i < kBlocks; ++i) {
      decode_block<T, kBits>(packed, words[i], unit, values + column + i * kColumns);
      packed += kGroups * kBits;
    }
    groups = _mm256_add_epi64(groups, _mm256_set1_epi64x(kBlocks * kGroups));
  }
  for (; column < hidden; column += kColumns) {
    const int64_t num_values = std::min<int64_t>(kColumns, hidden - column);
    uint8_t codes[kGroups * kBits + 8] = {};
    std::memcpy(codes, packed, packed_bytes(num_values, kBits));
    Words words[1];
    random_words(groups, philox_row, random, words);
    T block[kColumns];
    decode_block<T, kBits>(codes, words[0], unit, block);
    std::memcpy(values + column, block, num_values * sizeof(T));
    packed += kGroups * kBits;
    groups = _mm256_add_epi64(groups, _mm256_set1_epi64x(kGroups));
  }
}

}  // namespace

template <typename T>
const UnpackDithered<T>& unpack_dithered_avx2() {
  static constexpr UnpackDithered<T> kernels = {{nullptr, nullptr, decode<T, 2>, decode<T, 3>,
                                                 decode<T, 4>, decode<T, 5>, decode<T, 6>,
                                                 decode<T, 7>, decode<T, 8>}};
  return kernels;
}

template const UnpackDithered<float>& unpack_dithered_avx2();
template const UnpackDithered<Bf16>& unpack_dithered_avx2();

}  // namespace moe_comp

#endif  // MMC_X86
