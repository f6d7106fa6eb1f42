// unpack_dequantize with AVX-512: 64 columns at a time.
#include "isa.h"
#if MMC_X86

#include "avx512.h"
#include "unpack_dequantize.h"

namespace moe_comp {
namespace {

struct Levels {
  __m512i middle;  // the code of zero
  __m512 step;
};

MMC_TARGET_INLINE __m512 dequantize(__m512i code, const Levels& levels) {
  return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(code, levels.middle)), levels.step);
}

// A store that bypasses the caches spares reading what it overwrites.
template <bool kStreaming>
MMC_TARGET_INLINE void store_columns(__m512i codes, const Levels& levels, __mmask64 valid,
                                     float* values) {
  static constexpr auto kSpread = byte_index<64>([](int i) { return i / 4; });
  __m512i index = _mm512_load_si512(kSpread.of);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i code = _mm512_maskz_permutexvar_epi8(0x1111111111111111, index, codes);
    const __m512 x = dequantize(code, levels);
    if constexpr (kStreaming) {
      _mm512_stream_ps(values + 16 * i, x);
    } else {
      _mm512_mask_storeu_ps(values + 16 * i, static_cast<__mmask16>(valid >> (16 * i)), x);
    }
    index = _mm512_add_epi8(index, _mm512_set1_epi8(16));
  }
}

// The arithmetic limits this one: stores that bypass the caches were measured to gain nothing.
template <bool /*kStreaming*/>
MMC_TARGET_INLINE void store_columns(__m512i codes, const Levels& levels, __mmask64 valid,
                                     Bf16* values) {
  static constexpr auto kSpread = byte_index<64>([](int i) { return i / 4 * 2; });
  __m512i index = _mm512_load_si512(kSpread.of);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512i even_code = _mm512_maskz_permutexvar_epi8(0x1111111111111111, index, codes);
    index = _mm512_add_epi8(index, _mm512_set1_epi8(1));
    const __m512i odd_code = _mm512_maskz_permutexvar_epi8(0x1111111111111111, index, codes);
    index = _mm512_add_epi8(index, _mm512_set1_epi8(31));
    const __m512i even = round_upper_half(dequantize(even_code, levels));
    const __m512i odd = round_upper_half(dequantize(odd_code, levels));
    const __m512i both = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(even, 16), odd);
    _mm512_mask_storeu_epi16(values + 32 * i, static_cast<__mmask32>(valid >> (32 * i)), both);
  }
}

template <typename T, int kBits, bool kStreaming>
MMC_TARGET_INLINE void decode_block(const uint8_t* packed, int64_t num_values, const Levels& levels,
                                    T* values) {
  const __mmask64 used = first_bytes(packed_bytes(num_values, kBits));
  const __m512i codes = unpack<kBits>(_mm512_maskz_loadu_epi8(used, packed));
  store_columns<kStreaming>(codes, levels, first_bytes(num_values), values);
}

template <typename T, int kBits, bool kStreaming>
MMC_TARGET_INLINE void decode_row(const uint8_t* packed, int64_t hidden, float step, T* values) {
  const Levels row_levels{_mm512_set1_epi32(levels(kBits)), _mm512_set1_ps(step)};
  int64_t column = 0;
  for (; column + kColumns <= hidden; column += kColumns) {
    decode_block<T, kBits, kStreaming>(packed, kColumns, row_levels, values + column);
    packed += kColumns / 8 * kBits;
  }
  if (column < hidden) {
    decode_block<T, kBits, false>(packed, hidden - column, row_levels, values + column);
  }
}

template <typename T, int kBits>
MMC_TARGET void decode(const uint8_t* packed, int64_t hidden, float step, T* values,
                       bool streaming) {
  if (streaming) {
    decode_row<T, kBits, true>(packed, hidden, step, values);
  } else {
    decode_row<T, kBits, false>(packed, hidden, step, values);
  }
}

}  // namespace

template <typename T>
const UnpackDequantize<T>& unpack_dequantize_avx512() {
  static constexpr UnpackDequantize<T> kernels = {{nullptr, nullptr, decode<T, 2>, decode<T, 3>,
                                                   decode<T, 4>, decode<T, 5>, decode<T, 6>,
                                                   decode<T, 7>, decode<T, 8>}};
  return kernels;
}

template const UnpackDequantize<float>& unpack_dequantize_avx512();
template const UnpackDequantize<Bf16>& unpack_dequantize_avx512();

}  // namespace moe_comp

#endif  // MMC_X86
