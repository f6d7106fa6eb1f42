// unpack_dithered with AVX-512: 64 columns, which are eight Philox calls, at a time.
#include "isa.h"
#if MMC_X86

#include <algorithm>

#include "avx512.h"
#include "unpack_dithered.h"

namespace moe_comp {
namespace {

struct Levels {
  __m512i origin;  // what makes a code in 16.16 fixed point the middle of its step
  __m512 unit;
};

// Of codes in byte 2 of 32-bit lanes, and random halves.
MMC_TARGET_INLINE __m512 dequantize(__m512i code, __m512i half, const Levels& levels) {
  const __m512i fixed_point = _mm512_sub_epi32(_mm512_add_epi32(code, levels.origin), half);
  return _mm512_mul_ps(_mm512_cvtepi32_ps(fixed_point), levels.unit);
}

template <bool kStreaming>
MMC_TARGET_INLINE void store_columns(__m512i codes, Halves halves, const Levels& levels,
                                     __mmask64 valid, float* values) {
  static constexpr auto kSpread = byte_index<64>([](int i) { return i / 4; });
  __m512i index = _mm512_load_si512(kSpread.of);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i code = _mm512_maskz_permutexvar_epi8(0x4444444444444444, index, codes);
    const __m512i pair = i < 2 ? halves.low : halves.high;
    const __m256i half =
        i % 2 == 0 ? _mm512_castsi512_si256(pair) : _mm512_extracti64x4_epi64(pair, 1);
    const __m512 x = dequantize(code, _mm512_cvtepu16_epi32(half), levels);
    if constexpr (kStreaming) {
      _mm512_stream_ps(values + 16 * i, x);
    } else {
      _mm512_mask_storeu_ps(values + 16 * i, static_cast<__mmask16>(valid >> (16 * i)), x);
    }
    index = _mm512_add_epi8(index, _mm512_set1_epi8(16));
  }
}

// Even and odd columns are the halves of 32-bit lanes, of the values and of the random words.
template <bool /*kStreaming*/>
MMC_TARGET_INLINE void store_columns(__m512i codes, Halves halves, const Levels& levels,
                                     __mmask64 valid, Bf16* values) {
  static constexpr auto kSpread = byte_index<64>([](int i) { return i / 4 * 2; });
  __m512i index = _mm512_load_si512(kSpread.of);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512i even_code = _mm512_maskz_permutexvar_epi8(0x4444444444444444, index, codes);
    index = _mm512_add_epi8(index, _mm512_set1_epi8(1));
    const __m512i odd_code = _mm512_maskz_permutexvar_epi8(0x4444444444444444, index, codes);
    index = _mm512_add_epi8(index, _mm512_set1_epi8(31));
    const __m512i half = i == 0 ? halves.low : halves.high;
    const __m512i even_half = _mm512_and_si512(half, _mm512_set1_epi32(0xffff));
    const __m512i even = round_upper_half(dequantize(even_code, even_half, levels));
    const __m512i odd = round_upper_half(dequantize(odd_code, _mm512_srli_epi32(half, 16), levels));
    const __m512i both = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(even, 16), odd);
    _mm512_mask_storeu_epi16(values + 32 * i, static_cast<__mmask32>(valid >> (32 * i)), both);
  }
}

// Decodes `kNumBlocks` blocks of columns; the last of them holds `num_values` values.
template <typename T, int kBits, int kNumBlocks, bool kStreaming>
MMC_TARGET_INLINE void decode_blocks(const uint8_t* packed, __m512i groups, const PhiloxRow& row,
                                     const RandomStream& random, const Levels& levels,
                                     int64_t num_values, T* values) {
  Halves halves[kNumBlocks];
  random_halves(groups, row, random, halves);
#pragma GCC unroll 4
  for (int i = 0; i < kNumBlocks; ++i) {
    const int64_t block_values = i == kNumBlocks - 1 ? num_values : kColumns;
    const __mmask64 used = first_bytes(packed_bytes(block_values, kBits));
    const __m512i codes = unpack<kBits>(_mm512_maskz_loadu_epi8(used, packed));
    store_columns<kStreaming>(codes, halves[i], levels, first_bytes(block_values), values);
    packed += kGroups * kBits;
    values += kColumns;
  }
}

template <typename T, int kBits, bool kStreaming>
MMC_TARGET_INLINE void decode_row(const uint8_t* packed, int64_t hidden, uint32_t row_number,
                                  float unit, const RandomStream& random, T* values) {
  const PhiloxRow row(row_number, random);
  const Levels row_levels{_mm512_set1_epi32(-levels(kBits) * 65536), _mm512_set1_ps(unit)};
  __m512i groups = _mm512_load_si512(kGroupOfLane);
  int64_t column = 0;
  for (; column + kBlocks * kColumns <= hidden; column += kBlocks * kColumns) {
    decode_blocks<T, kBits, kBlocks, kStreaming>(packed, groups, row, random, row_levels, kColumns,
                                                 values + column);
    packed += kBlocks * kGroups * kBits;
    groups = _mm512_add_epi64(groups, _mm512_set1_epi64(kBlocks * kGroups));
  }
  for (; column < hidden; column += kColumns) {
    const int64_t num_values = std::min<int64_t>(kColumns, hidden - column);
    decode_blocks<T, kBits, 1, false>(packed, groups, row, random, row_levels, num_values,
                                      values + column);
    packed += kGroups * kBits;
    groups = _mm512_add_epi64(groups, _mm512_set1_epi64(kGroups));
  }
}

template <typename T, int kBits>
MMC_TARGET void decode(const uint8_t* packed, int64_t hidden, uint32_t row, float unit,
                       const RandomStream& random, float /*largest*/, T* values, bool streaming) {
  if (streaming) {
    decode_row<T, kBits, true>(packed, hidden, row, unit, random, values);
  } else {
    decode_row<T, kBits, false>(packed, hidden, row, unit, random, values);
  }
}

}  // namespace

template <typename T>
const UnpackDithered<T>& unpack_dithered_avx512() {
  static constexpr UnpackDithered<T> kernels = {{nullptr, nullptr, decode<T, 2>, decode<T, 3>,
                                                 decode<T, 4>, decode<T, 5>, decode<T, 6>,
                                                 decode<T, 7>, decode<T, 8>}};
  return kernels;
}

template const UnpackDithered<float>& unpack_dithered_avx512();
template const UnpackDithered<Bf16>& unpack_dithered_avx512();

}  // namespace moe_comp

#endif  // MMC_X86
