// gaussian_pack and gaussian_unpack with AVX-512: 64 columns at a time.
#include "isa.h"
#if MMC_X86

#include <algorithm>

#include "avx512.h"
#include "gaussian.h"

namespace moe_comp {
namespace {

MMC_TARGET_INLINE __m512 load16(const float* values, __mmask16 valid) {
  return _mm512_maskz_loadu_ps(valid, values);
}

MMC_TARGET_INLINE __m512 load16(const Bf16* values, __mmask16 valid) {
  const __m512i upper = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid, values));
  return _mm512_castsi512_ps(_mm512_slli_epi32(upper, 16));
}

// Adds the squares of sixteen values. They are exact, so fusing rounds no other way.
MMC_TARGET_INLINE void add_squares(__m512 x, __m512d& low, __m512d& high) {
  const __m512d first = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
  const __m512d second = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
  low = _mm512_fmadd_pd(first, first, low);
  high = _mm512_fmadd_pd(second, second, high);
}

template <typename T>
MMC_TARGET double sum_of_squares(const T* values, int64_t hidden) {
  double sum = 0.0;
  for (int64_t first = 0; first < hidden; first += kSumColumns) {
    const int64_t last = std::min<int64_t>(first + kSumColumns, hidden);
    __m512d lanes[4];
    for (__m512d& lane : lanes) lane = _mm512_setzero_pd();
    int64_t column = first;
    for (; column + kSumLanes <= last; column += kSumLanes) {
      add_squares(load16(values + column, 0xffff), lanes[0], lanes[1]);
      add_squares(load16(values + column + 16, 0xffff), lanes[2], lanes[3]);
    }
    if (column < last) {
      const auto valid = static_cast<uint32_t>(first_bytes(last - column));
      add_squares(load16(values + column, static_cast<__mmask16>(valid)), lanes[0], lanes[1]);
      add_squares(load16(values + column + 16, static_cast<__mmask16>(valid >> 16)), lanes[2],
                  lanes[3]);
    }
    const __m512d eight = _mm512_add_pd(_mm512_add_pd(lanes[0], lanes[2]),
                                        _mm512_add_pd(lanes[1], lanes[3]));
    const __m256d four =
        _mm256_add_pd(_mm512_castpd512_pd256(eight), _mm512_extractf64x4_pd(eight, 1));
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    sum += _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }
  return sum;
}

// The cells of sixteen values, as integers.
template <typename T>
MMC_TARGET_INLINE __m512i cells(const T* values, __mmask64 valid, int i, __m512 per_unit) {
  const __m512 x = load16(values + 16 * i, static_cast<__mmask16>(valid >> (16 * i)));
  return _mm512_cvt_roundps_epi32(_mm512_mul_ps(x, per_unit),
                                  _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}

template <typename T, int kBits>
MMC_TARGET_INLINE __m512i codes_of(const T* values, __mmask64 valid, __m512 per_unit) {
  static constexpr auto kCodes = byte_index<64>(
      [](int i) { return (1 << (kBits - 1)) + index_of_cell<kBits>(i); });
  static constexpr auto kFarCodes = byte_index<64>(
      [](int i) { return (1 << (kBits - 1)) + index_of_cell<kBits>(64 + i); });
  // Packing saturates, to the cells of a byte in the end; it leaves vector j of four in every
  // fourth 32-bit lane from j on.
  const __m512i words01 = _mm512_packs_epi32(cells(values, valid, 0, per_unit),
                                             cells(values, valid, 1, per_unit));
  const __m512i words23 = _mm512_packs_epi32(cells(values, valid, 2, per_unit),
                                             cells(values, valid, 3, per_unit));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i cell = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(words01, words23));
  const __mmask64 negative = _mm512_movepi8_mask(cell);
  const __m512i all = _mm512_set1_epi8(-1), top = _mm512_set1_epi8((1 << kBits) - 1);
  const __m512i mirrored =
      _mm512_xor_si512(cell, _mm512_maskz_mov_epi8(negative, all));
  const __m512i code = _mm512_permutex2var_epi8(_mm512_load_si512(kCodes.of), mirrored,
                                                _mm512_load_si512(kFarCodes.of));
  return _mm512_xor_si512(code, _mm512_maskz_mov_epi8(negative, top));
}

template <typename T, int kBits>
MMC_TARGET void encode(const T* values, int64_t hidden, float per_unit, uint8_t* packed) {
  const __m512 factor = _mm512_set1_ps(per_unit);
  int64_t column = 0;
  for (; column + kColumns <= hidden; column += kColumns) {
    const __m512i codes = codes_of<T, kBits>(values + column, kAll, factor);
    _mm512_mask_storeu_epi8(packed, first_bytes(kGroups * kBits), pack<kBits>(codes));
    packed += kGroups * kBits;
  }
  if (column < hidden) {
    const __mmask64 valid = first_bytes(hidden - column);
    const __m512i codes = codes_of<T, kBits>(values + column, valid, factor);
    _mm512_mask_storeu_epi8(packed, first_bytes(packed_bytes(hidden - column, kBits)),
                            pack<kBits>(_mm512_maskz_mov_epi8(valid, codes)));
  }
}

// A store that bypasses the caches spares reading what it overwrites.
template <bool kStreaming>
MMC_TARGET_INLINE void store_levels(__m512i codes, const float* levels, __mmask64 valid,
                                    float* values) {
  static constexpr auto kSpread = byte_index<64>([](int i) { return i / 4; });
  __m512i index = _mm512_load_si512(kSpread.of);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    // Of an index, four bits count.
    const __m512 x =
        _mm512_permutexvar_ps(_mm512_permutexvar_epi8(index, codes), _mm512_load_ps(levels));
    if constexpr (kStreaming) {
      _mm512_stream_ps(values + 16 * i, x);
    } else {
      _mm512_mask_storeu_ps(values + 16 * i, static_cast<__mmask16>(valid >> (16 * i)), x);
    }
    index = _mm512_add_epi8(index, _mm512_set1_epi8(16));
  }
}

template <bool /*kStreaming*/>
MMC_TARGET_INLINE void store_levels(__m512i codes, const Bf16* levels, __mmask64 valid,
                                    Bf16* values) {
  const __m512i table =
      _mm512_castsi256_si512(_mm256_load_si256(reinterpret_cast<const __m256i*>(levels)));
  const __m512i low = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(codes));
  const __m512i high = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(codes, 1));
  _mm512_mask_storeu_epi16(values, static_cast<__mmask32>(valid),
                           _mm512_permutexvar_epi16(low, table));
  _mm512_mask_storeu_epi16(values + 32, static_cast<__mmask32>(valid >> 32),
                           _mm512_permutexvar_epi16(high, table));
}

template <typename T, int kBits, bool kStreaming>
MMC_TARGET_INLINE void decode_row(const uint8_t* packed, int64_t hidden, const T* levels,
                                  T* values) {
  int64_t column = 0;
  for (; column + kColumns <= hidden; column += kColumns) {
    const __m512i octets = _mm512_maskz_loadu_epi8(first_bytes(kGroups * kBits), packed);
    store_levels<kStreaming>(unpack<kBits>(octets), levels, kAll, values + column);
    packed += kGroups * kBits;
  }
  if (column < hidden) {
    const __mmask64 used = first_bytes(packed_bytes(hidden - column, kBits));
    store_levels<false>(unpack<kBits>(_mm512_maskz_loadu_epi8(used, packed)), levels,
                        first_bytes(hidden - column), values + column);
  }
}

template <typename T, int kBits>
MMC_TARGET void decode(const uint8_t* packed, int64_t hidden, const T* levels, T* values,
                       bool streaming) {
  if (streaming) {
    decode_row<T, kBits, true>(packed, hidden, levels, values);
  } else {
    decode_row<T, kBits, false>(packed, hidden, levels, values);
  }
}

}  // namespace

template <typename T>
const Gaussian<T>& gaussian_avx512() {
  static constexpr Gaussian<T> kernels = {
      sum_of_squares<T>,
      {nullptr, nullptr, encode<T, 2>, encode<T, 3>, encode<T, 4>},
      {nullptr, nullptr, decode<T, 2>, decode<T, 3>, decode<T, 4>}};
  return kernels;
}

template const Gaussian<float>& gaussian_avx512();
template const Gaussian<Bf16>& gaussian_avx512();

}  // namespace moe_comp

#endif  // MMC_X86
