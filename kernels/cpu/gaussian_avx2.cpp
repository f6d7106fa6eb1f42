// gaussian_pack and gaussian_unpack with AVX2: 32 columns and a group of eight columns at a time.
#include "isa.h"
#if MMC_X86

#include <algorithm>

#include "avx2.h"
#include "gaussian.h"

namespace moe_comp {
namespace {

MMC_TARGET_INLINE __m256 load8(const float* values) { return _mm256_loadu_ps(values); }

MMC_TARGET_INLINE __m256 load8(const Bf16* values) {
  const __m128i upper = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(upper), 16));
}

// Adds the squares of 32 values.
template <typename T>
MMC_TARGET_INLINE void add_squares(const T* values, __m256d (&lanes)[8]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256 x = load8(values + 8 * i);
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(x));
    const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
    lanes[2 * i] = _mm256_add_pd(lanes[2 * i], _mm256_mul_pd(low, low));
    lanes[2 * i + 1] = _mm256_add_pd(lanes[2 * i + 1], _mm256_mul_pd(high, high));
  }
}

template <typename T>
MMC_TARGET double sum_of_squares(const T* values, int64_t hidden) {
  double sum = 0.0;
  for (int64_t first = 0; first < hidden; first += kSumColumns) {
    const int64_t last = std::min<int64_t>(first + kSumColumns, hidden);
    __m256d lanes[8];
    for (__m256d& lane : lanes) lane = _mm256_setzero_pd();
    int64_t column = first;
    for (; column + kSumLanes <= last; column += kSumLanes) add_squares(values + column, lanes);
    if (column < last) {
      T block[kSumLanes] = {};
      std::memcpy(block, values + column, (last - column) * sizeof(T));
      add_squares(block, lanes);
    }
    for (int half = 4; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) lanes[i] = _mm256_add_pd(lanes[i], lanes[i + half]);
    }
    const __m128d two =
        _mm_add_pd(_mm256_castpd256_pd128(lanes[0]), _mm256_extractf128_pd(lanes[0], 1));
    sum += _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }
  return sum;
}

// The cells of eight values, as integers.
template <typename T>
MMC_TARGET_INLINE __m256i cells(const T* values, __m256 per_unit) {
  return _mm256_cvtps_epi32(_mm256_floor_ps(_mm256_mul_ps(load8(values), per_unit)));
}

// The codes of 32 values, a byte each.
template <typename T, int kBits>
MMC_TARGET_INLINE __m256i codes_of(const T* values, __m256 per_unit) {
  // Packing saturates, to the cells of a byte in the end.
  const __m256i packed = _mm256_packs_epi16(
      _mm256_packs_epi32(cells(values, per_unit), cells(values + 8, per_unit)),
      _mm256_packs_epi32(cells(values + 16, per_unit), cells(values + 24, per_unit)));
  const __m256i cell =
      _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  const __m256i negative = _mm256_cmpgt_epi8(_mm256_setzero_si256(), cell);
  const __m256i mirrored = _mm256_xor_si256(cell, negative);
  __m256i code = _mm256_set1_epi8(1 << (kBits - 1));
#pragma GCC unroll 8
  for (int i = 0; i < (1 << (kBits - 1)) - 1; ++i) {
    const int8_t below = kGaussianLevels[kBits - 2].thresholds[i] - 1;
    code = _mm256_sub_epi8(code, _mm256_cmpgt_epi8(mirrored, _mm256_set1_epi8(below)));
  }
  const __m256i top = _mm256_set1_epi8((1 << kBits) - 1);
  return _mm256_xor_si256(code, _mm256_and_si256(negative, top));
}

template <typename T, int kBits>
MMC_TARGET void encode(const T* values, int64_t hidden, float per_unit, uint8_t* packed) {
  const __m256 factor = _mm256_set1_ps(per_unit);
  int64_t column = 0;
  for (; column + kColumns <= hidden; column += kColumns) {
    store_packed<kBits>(codes_of<T, kBits>(values + column, factor), packed);
    packed += kGroups * kBits;
  }
  if (column < hidden) {
    const int64_t num_values = hidden - column;
    T block[kColumns] = {};
    std::memcpy(block, values + column, num_values * sizeof(T));
    static constexpr auto kColumn = byte_index<32>([](int i) { return i; });
    const __m256i is_value =
        _mm256_cmpgt_epi8(_mm256_set1_epi8(static_cast<char>(num_values)), load(kColumn.of));
    uint8_t bytes[kGroups * kBits];
    store_packed<kBits>(_mm256_and_si256(codes_of<T, kBits>(block, factor), is_value), bytes);
    std::memcpy(packed, bytes, packed_bytes(num_values, kBits));
  }
}

// Sixteen levels, a 32-bit lane each.
struct Levels {
  __m256i low;
  __m256i high;
};

MMC_TARGET_INLINE Levels load_levels(const float* levels) {
  return {load(levels), load(levels + 8)};
}

MMC_TARGET_INLINE Levels load_levels(const Bf16* levels) {
  const __m256i bits = load(levels);
  return {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(bits)),
          _mm256_cvtepu16_epi32(_mm256_extracti128_si256(bits, 1))};
}

MMC_TARGET_INLINE void store_levels(__m256i levels, float* values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(values), levels);
}

MMC_TARGET_INLINE void store_levels(__m256i levels, Bf16* values) {
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(levels, levels), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(values), _mm256_castsi256_si128(packed));
}

template <int kBits>
MMC_TARGET_INLINE __m256i levels_of(uint64_t octets, const Levels& levels) {
  const __m256i codes = unpack<kBits>(_mm256_set1_epi64x(static_cast<int64_t>(octets)));
  const __m256i low = _mm256_permutevar8x32_epi32(levels.low, codes);
  if constexpr (kBits < 4) {
    return low;
  } else {
    const __m256i high = _mm256_permutevar8x32_epi32(levels.high, codes);
    return _mm256_blendv_epi8(low, high, _mm256_cmpgt_epi32(codes, _mm256_set1_epi32(7)));
  }
}

template <typename T, int kBits>
MMC_TARGET void decode(const uint8_t* packed, int64_t hidden, const T* table, T* values,
                       bool /*streaming*/) {
  const Levels levels = load_levels(table);
  const uint8_t* const end = packed + packed_bytes(hidden, kBits);
  int64_t column = 0;
  for (; column + 8 <= hidden && end - packed >= 8; column += 8) {
    uint64_t octets;
    std::memcpy(&octets, packed, 8);
    store_levels(levels_of<kBits>(octets, levels), values + column);
    packed += kBits;
  }
  // The last groups, behind which there are fewer than eight bytes to read.
  for (; column < hidden; column += 8) {
    const int64_t num_values = std::min<int64_t>(8, hidden - column);
    uint64_t octets = 0;
    std::memcpy(&octets, packed, packed_bytes(num_values, kBits));
    T group[8];
    store_levels(levels_of<kBits>(octets, levels), group);
    std::memcpy(values + column, group, num_values * sizeof(T));
    packed += kBits;
  }
}

}  // namespace

template <typename T>
const Gaussian<T>& gaussian_avx2() {
  static constexpr Gaussian<T> kernels = {
      sum_of_squares<T>,
      {nullptr, nullptr, encode<T, 2>, encode<T, 3>, encode<T, 4>},
      {nullptr, nullptr, decode<T, 2>, decode<T, 3>, decode<T, 4>}};
  return kernels;
}

template const Gaussian<float>& gaussian_avx2();
template const Gaussian<Bf16>& gaussian_avx2();

}  // namespace moe_comp

#endif  // MMC_X86
