// quantize_pack with AVX2: 32 columns, which are four Philox calls, at a time.
#include "isa.h"
#if MMC_X86

#include <algorithm>

#include "avx2.h"
#include "quantize_pack.h"

namespace moe_comp {
namespace {

struct FixedPoint {
  __m256 inverse;
  __m256 top;
};

// x in 16.16 fixed point plus a random half: the code is byte 2.
MMC_TARGET_INLINE __m256i add_half(__m256 x, __m256i half, const FixedPoint& fixed_point) {
  const __m256 shifted = _mm256_add_ps(_mm256_mul_ps(x, fixed_point.inverse), fixed_point.top);
  return _mm256_add_epi32(_mm256_cvtps_epi32(shifted), half);
}

template <typename T>
struct Rows;

template <>
struct Rows<float> {
  alignas(32) static constexpr uint64_t kGroupOfLane[kGroups] = {0, 1, 2, 3};

  static MMC_TARGET_INLINE __m256i max_magnitude(__m256i max, __m256i x) {
    return _mm256_max_epu32(max, _mm256_and_si256(x, _mm256_set1_epi32(0x7fffffff)));
  }

  // The codes of 32 values, a byte each.
  static MMC_TARGET_INLINE __m256i codes(const float* values, Words words,
                                         const FixedPoint& fixed_point) {
    const __m256i zero = _mm256_setzero_si256();
    const __m256i groups01 = _mm256_permute2x128_si256(words.words01, words.words23, 0x20);
    const __m256i groups23 = _mm256_permute2x128_si256(words.words01, words.words23, 0x31);
    const __m256i halves[kGroups] = {
        _mm256_unpacklo_epi16(groups01, zero), _mm256_unpackhi_epi16(groups01, zero),
        _mm256_unpacklo_epi16(groups23, zero), _mm256_unpackhi_epi16(groups23, zero)};
    __m256i codes[kGroups];
#pragma GCC unroll 4
    for (int i = 0; i < kGroups; ++i) {
      const __m256 x = _mm256_loadu_ps(values + 8 * i);
      codes[i] = _mm256_srli_epi32(add_half(x, halves[i], fixed_point), 16);
    }
    const __m256i packed = _mm256_packus_epi16(_mm256_packus_epi32(codes[0], codes[1]),
                                               _mm256_packus_epi32(codes[2], codes[3]));
    return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }
};

template <>
struct Rows<Bf16> {
  alignas(32) static constexpr uint64_t kGroupOfLane[kGroups] = {0, 2, 1, 3};

  static MMC_TARGET_INLINE __m256i max_magnitude(__m256i max, __m256i x) {
    return _mm256_max_epu16(max, _mm256_and_si256(x, _mm256_set1_epi16(0x7fff)));
  }

  // Even and odd columns are the halves of 32-bit lanes, of the values and of the random words.
  static MMC_TARGET_INLINE __m256i codes(const Bf16* values, Words words,
                                         const FixedPoint& fixed_point) {
    const __m256i halves[2] = {_mm256_unpacklo_epi64(words.words01, words.words23),
                               _mm256_unpackhi_epi64(words.words01, words.words23)};
    __m256i codes[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m256i x = load(values + 16 * i);
      const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000));
      const __m256i even =
          add_half(_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)),
                   _mm256_and_si256(halves[i], _mm256_set1_epi32(0xffff)), fixed_point);
      const __m256i odd = add_half(_mm256_castsi256_ps(_mm256_and_si256(x, upper)),
                                   _mm256_srli_epi32(halves[i], 16), fixed_point);
      codes[i] = _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa);
    }
    return _mm256_permute4x64_epi64(_mm256_packus_epi16(codes[0], codes[1]), 0xd8);
  }
};

template <typename T, int kBits>
MMC_TARGET void encode(const T* values, int64_t hidden, uint32_t row, float inverse, float top,
                       const RandomStream& random, uint8_t* packed) {
  const PhiloxRow philox_row(row, random);
  const FixedPoint fixed_point{_mm256_set1_ps(inverse), _mm256_set1_ps(top)};
  __m256i groups = load(Rows<T>::kGroupOfLane);
  int64_t column = 0;
  for (; column + kBlocks * kColumns <= hidden; column += kBlocks * kColumns) {
    Words words[kBlocks];
    random_words(groups, philox_row, random, words);
#pragma GCC unroll 4
    for (int i = 0; i < kBlocks; ++i) {
      for (size_t byte = 0; byte < kColumns * sizeof(T); byte += 64) {
        const T* next_row = values + column + i * kColumns + hidden;
        _mm_prefetch(reinterpret_cast<const char*>(next_row) + byte, _MM_HINT_T0);
      }
      store_packed<kBits>(Rows<T>::codes(values + column + i * kColumns, words[i], fixed_point),
                          packed);
      packed += 4 * kBits;
    }
    groups = _mm256_add_epi64(groups, _mm256_set1_epi64x(kBlocks * kGroups));
  }
  for (; column < hidden; column += kColumns) {
    const int64_t num_values = hidden - column < kColumns ? hidden - column : kColumns;
    T block[kColumns] = {};
    std::memcpy(block, values + column, num_values * sizeof(T));
    Words words[1];
    random_words(groups, philox_row, random, words);
    __m256i codes = Rows<T>::codes(block, words[0], fixed_point);
    static constexpr auto kColumn = byte_index<32>([](int i) { return i; });
    const __m256i is_value =
        _mm256_cmpgt_epi8(_mm256_set1_epi8(static_cast<char>(num_values)), load(kColumn.of));
    uint8_t bytes[4 * kBits];
    store_packed<kBits>(_mm256_and_si256(codes, is_value), bytes);
    std::memcpy(packed, bytes, packed_bytes(num_values, kBits));
    packed += 4 * kBits;
    groups = _mm256_add_epi64(groups, _mm256_set1_epi64x(kGroups));
  }
}

template <typename T>
MMC_TARGET uint32_t absmax_bits(const T* values, int64_t hidden) {
  constexpr int kValues = 32 / sizeof(T);
  __m256i max[4] = {};
  int64_t column = 0;
  for (; column + 4 * kValues <= hidden; column += 4 * kValues) {
    for (int i = 0; i < 4; ++i) {
      max[i] = Rows<T>::max_magnitude(max[i], load(values + column + i * kValues));
    }
  }
  max[0] = Rows<T>::max_magnitude(max[0], max[1]);
  max[2] = Rows<T>::max_magnitude(max[2], max[3]);
  T largest[kValues];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(largest), Rows<T>::max_magnitude(max[0], max[2]));
  uint32_t bits = 0;
  for (const T x : largest) bits = std::max(bits, magnitude_bits(x));
  for (; column < hidden; ++column) bits = std::max(bits, magnitude_bits(values[column]));
  return bits;
}

}  // namespace

template <typename T>
const QuantizePack<T>& quantize_pack_avx2() {
  static constexpr QuantizePack<T> kernels = {
      absmax_bits<T>,
      {nullptr, nullptr, encode<T, 2>, encode<T, 3>, encode<T, 4>, encode<T, 5>, encode<T, 6>,
       encode<T, 7>, encode<T, 8>}};
  return kernels;
}

template const QuantizePack<float>& quantize_pack_avx2();
template const QuantizePack<Bf16>& quantize_pack_avx2();

}  // namespace moe_comp

#endif  // MMC_X86
