// quantize_pack with AVX-512: 64 columns, which are eight Philox calls, at a time.
#include "isa.h"
#if MMC_X86

#include <algorithm>

#include "avx512.h"
#include "quantize_pack.h"

namespace moe_comp {
namespace {

struct FixedPoint {
  __m512 inverse;
  __m512 top;
};

// x in 16.16 fixed point plus a random half: the code is byte 2.
MMC_TARGET_INLINE __m512i add_half(__m512 x, __m512i half, const FixedPoint& fixed_point) {
  const __m512 shifted = _mm512_add_ps(_mm512_mul_ps(x, fixed_point.inverse), fixed_point.top);
  return _mm512_add_epi32(_mm512_cvtps_epi32(shifted), half);
}

// Byte 2 of every 32-bit lane of four vectors, as the bytes 0, 2, 1, 3 of the lane.
constexpr int kByteOfVector[4] = {0, 2, 1, 3};
alignas(64) constexpr auto kByte2ToByte0 = byte_index<64>([](int i) { return i / 4 * 4 % 16 + 2; });

MMC_TARGET_INLINE __m512i gather_codes(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i index = _mm512_load_si512(kByte2ToByte0.of);
  b = _mm512_mask_shuffle_epi8(b, 0x1111111111111111, a, index);
  b = _mm512_mask_shuffle_epi8(b, 0x2222222222222222, c, index);
  return _mm512_mask_shuffle_epi8(b, 0x8888888888888888, d, index);
}

template <typename T>
struct Rows;

template <>
struct Rows<float> {
  static constexpr auto kHalves = byte_index<64>([](int i) { return i / 4 * 2 + i % 4 % 2; });
  static constexpr auto kOrder =
      byte_index<64>([](int i) { return i % 16 * 4 + kByteOfVector[i / 16]; });

  // The largest magnitude of 16 32-bit patterns, as an element-wise maximum with `max`.
  static MMC_TARGET_INLINE __m512i max_magnitude(__m512i max, __m512i x) {
    return _mm512_max_epu32(max, _mm512_and_si512(x, _mm512_set1_epi32(0x7fffffff)));
  }
  static MMC_TARGET_INLINE __m512i load(const float* values, __mmask64 valid) {
    return _mm512_maskz_loadu_epi32(static_cast<__mmask16>(valid), values);
  }
  static MMC_TARGET_INLINE uint32_t reduce(__m512i max) { return _mm512_reduce_max_epu32(max); }

  static MMC_TARGET_INLINE __m512i codes(const float* values, __mmask64 valid, Halves halves,
                                         const FixedPoint& fixed_point) {
    __m512i sum[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512 x = _mm512_castsi512_ps(load(values + 16 * i, valid >> (16 * i)));
      __m512i index = _mm512_load_si512(kHalves.of);
      if (i % 2 == 1) index = _mm512_add_epi8(index, _mm512_set1_epi8(32));
      const __m512i half = _mm512_maskz_permutexvar_epi8(0x3333333333333333, index,
                                                         i < 2 ? halves.low : halves.high);
      sum[i] = add_half(x, half, fixed_point);
    }
    return gather_codes(sum[0], sum[1], sum[2], sum[3]);
  }
};

template <>
struct Rows<Bf16> {
  static constexpr auto kOrder =
      byte_index<64>([](int i) { return i % 32 / 2 * 4 + kByteOfVector[i / 32 * 2 + i % 2]; });

  static MMC_TARGET_INLINE __m512i max_magnitude(__m512i max, __m512i x) {
    return _mm512_max_epu16(max, _mm512_and_si512(x, _mm512_set1_epi16(0x7fff)));
  }
  static MMC_TARGET_INLINE __m512i load(const Bf16* values, __mmask64 valid) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>(valid), values);
  }
  static MMC_TARGET_INLINE uint32_t reduce(__m512i max) {
    const __m512i odd = _mm512_srli_epi32(max, 16);
    const __m512i even = _mm512_and_si512(max, _mm512_set1_epi32(0xffff));
    return _mm512_reduce_max_epu32(_mm512_max_epu32(odd, even)) << 16;
  }

  // Even and odd columns are the halves of 32-bit lanes, of the values and of the random words.
  static MMC_TARGET_INLINE __m512i codes(const Bf16* values, __mmask64 valid, Halves halves,
                                         const FixedPoint& fixed_point) {
    __m512i sum[4];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m512i x = load(values + 32 * i, valid >> (32 * i));
      const __m512i half = i == 0 ? halves.low : halves.high;
      const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
      const __m512 odd =
          _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
      sum[2 * i] = add_half(even, _mm512_and_si512(half, _mm512_set1_epi32(0xffff)), fixed_point);
      sum[2 * i + 1] = add_half(odd, _mm512_srli_epi32(half, 16), fixed_point);
    }
    return gather_codes(sum[0], sum[1], sum[2], sum[3]);
  }
};

struct Row {
  PhiloxRow philox;
  const RandomStream& random;
  FixedPoint fixed_point;
  int64_t hidden;
};

// Encodes `kNumBlocks` blocks of columns; the last of them holds `num_values` values.
template <typename T, int kBits, int kNumBlocks>
MMC_TARGET_INLINE void encode_blocks(const Row& row, __m512i groups, const T* values,
                                     int64_t num_values, uint8_t* packed) {
  Halves halves[kNumBlocks];
  random_halves(groups, row.philox, row.random, halves);
  const __m512i order = _mm512_load_si512(Rows<T>::kOrder.of);
#pragma GCC unroll 4
  for (int i = 0; i < kNumBlocks; ++i) {
    // Brings the next row into the cache while this one, which is there, keeps the core busy.
    for (size_t byte = 0; byte < kColumns * sizeof(T); byte += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(values + row.hidden) + byte, _MM_HINT_T0);
    }
    const int64_t block_values = i == kNumBlocks - 1 ? num_values : kColumns;
    const __mmask64 valid = first_bytes(block_values);
    __m512i codes = Rows<T>::codes(values, valid, halves[i], row.fixed_point);
    codes = _mm512_maskz_permutexvar_epi8(valid, order, codes);
    _mm512_mask_storeu_epi8(packed, first_bytes(packed_bytes(block_values, kBits)),
                            pack<kBits>(codes));
    values += kColumns;
    packed += kGroups * kBits;
  }
}

template <typename T, int kBits>
MMC_TARGET void encode(const T* values, int64_t hidden, uint32_t row_number, float inverse,
                       float top, const RandomStream& random, uint8_t* packed) {
  const Row row{PhiloxRow(row_number, random),
                random,
                {_mm512_set1_ps(inverse), _mm512_set1_ps(top)},
                hidden};
  __m512i groups = _mm512_load_si512(kGroupOfLane);
  int64_t column = 0;
  for (; column + kBlocks * kColumns <= hidden; column += kBlocks * kColumns) {
    encode_blocks<T, kBits, kBlocks>(row, groups, values + column, kColumns, packed);
    packed += kBlocks * kGroups * kBits;
    groups = _mm512_add_epi64(groups, _mm512_set1_epi64(kBlocks * kGroups));
  }
  for (; column < hidden; column += kColumns) {
    const int64_t num_values = std::min<int64_t>(kColumns, hidden - column);
    encode_blocks<T, kBits, 1>(row, groups, values + column, num_values, packed);
    packed += kGroups * kBits;
    groups = _mm512_add_epi64(groups, _mm512_set1_epi64(kGroups));
  }
}

template <typename T>
MMC_TARGET uint32_t absmax_bits(const T* values, int64_t hidden) {
  constexpr int kValues = 64 / sizeof(T);
  __m512i max[4] = {};
  int64_t column = 0;
  for (; column + 4 * kValues <= hidden; column += 4 * kValues) {
    for (int i = 0; i < 4; ++i) {
      max[i] = Rows<T>::max_magnitude(max[i], Rows<T>::load(values + column + i * kValues, kAll));
    }
  }
  for (; column < hidden; column += kValues) {
    const __mmask64 valid = first_bytes(hidden - column);
    max[0] = Rows<T>::max_magnitude(max[0], Rows<T>::load(values + column, valid));
  }
  max[0] = Rows<T>::max_magnitude(max[0], max[1]);
  max[2] = Rows<T>::max_magnitude(max[2], max[3]);
  return Rows<T>::reduce(Rows<T>::max_magnitude(max[0], max[2]));
}

}  // namespace

template <typename T>
const QuantizePack<T>& quantize_pack_avx512() {
  static constexpr QuantizePack<T> kernels = {
      absmax_bits<T>,
      {nullptr, nullptr, encode<T, 2>, encode<T, 3>, encode<T, 4>, encode<T, 5>, encode<T, 6>,
       encode<T, 7>, encode<T, 8>}};
  return kernels;
}

template const QuantizePack<float>& quantize_pack_avx512();
template const QuantizePack<Bf16>& quantize_pack_avx512();

}  // namespace moe_comp

#endif  // MMC_X86
