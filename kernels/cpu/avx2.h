// What the AVX2 kernels share: random numbers and codes of 32 columns, and rows.
#pragma once

#include <immintrin.h>

#include "lanes.h"
#include "philox.h"
#include "row_types.h"

#define MMC_TARGET __attribute__((target("avx2")))
#define MMC_TARGET_INLINE MMC_TARGET __attribute__((always_inline)) inline

namespace moe_comp {
namespace {

constexpr int kColumns = 32;
constexpr int kGroups = kColumns / 8;
constexpr int kBlocks = 4;  // of columns, whose Philox calls are interleaved

MMC_TARGET_INLINE __m256i load(const void* address) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(address));
}

// Four groups' words 0 and 1, and words 2 and 3, as the halves of 64-bit lanes.
struct Words {
  __m256i words01;
  __m256i words23;
};

MMC_TARGET_INLINE __m256i high_words(__m256i products) { return _mm256_srli_epi64(products, 32); }

MMC_TARGET_INLINE __m256i xor3(__m256i a, __m256i b, const uint64_t* key) {
  return _mm256_xor_si256(_mm256_xor_si256(a, b), load(key));
}

// See avx512.h.
MMC_TARGET_INLINE __m256i last_words(__m256i products, __m256i word, const uint64_t* key) {
  const __m256i low_word = _mm256_and_si256(word, _mm256_set1_epi64x(0xffffffff));
  return xor3(_mm256_shuffle_epi32(products, 0xb1), low_word, key);
}

template <int kNumBlocks>
MMC_TARGET_INLINE void random_words(__m256i groups, const PhiloxRow& row,
                                    const RandomStream& random, Words (&words)[kNumBlocks]) {
  const __m256i m0 = _mm256_set1_epi64x(kPhiloxMultiplier0);
  const __m256i m1 = _mm256_set1_epi64x(kPhiloxMultiplier1);
  const auto& keys = random.round_keys;
  __m256i c0[kNumBlocks], c1[kNumBlocks], c2[kNumBlocks], c3[kNumBlocks];
#pragma GCC unroll 4
  for (int i = 0; i < kNumBlocks; ++i) {
    __m256i p0 = _mm256_mul_epu32(groups, m0);
    c2[i] = _mm256_xor_si256(high_words(p0), _mm256_set1_epi64x(row.round1_c2));
    __m256i p1 = _mm256_mul_epu32(c2[i], m1);
    c0[i] = _mm256_xor_si256(high_words(p1), _mm256_set1_epi64x(row.round2_c0));
    c1[i] = p1;
    c2[i] = _mm256_xor_si256(p0, _mm256_set1_epi64x(row.round2_c2));
    p0 = _mm256_mul_epu32(c0[i], m0);
    p1 = _mm256_mul_epu32(c2[i], m1);
    c0[i] = xor3(high_words(p1), c1[i], keys[2][0]);
    c1[i] = p1;
    c2[i] = _mm256_xor_si256(high_words(p0), _mm256_set1_epi64x(row.round3_c2));
    c3[i] = p0;
    groups = _mm256_add_epi64(groups, _mm256_set1_epi64x(kGroups));
  }
#pragma GCC unroll 8
  for (int round = 3; round < kPhiloxRounds - 1; ++round) {
#pragma GCC unroll 4
    for (int i = 0; i < kNumBlocks; ++i) {
      const __m256i p0 = _mm256_mul_epu32(c0[i], m0);
      const __m256i p1 = _mm256_mul_epu32(c2[i], m1);
      c0[i] = xor3(high_words(p1), c1[i], keys[round][0]);
      c1[i] = p1;
      c2[i] = xor3(high_words(p0), c3[i], keys[round][1]);
      c3[i] = p0;
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kNumBlocks; ++i) {
    const __m256i p0 = _mm256_mul_epu32(c0[i], m0);
    const __m256i p1 = _mm256_mul_epu32(c2[i], m1);
    words[i] = {last_words(p1, c1[i], keys[kPhiloxRounds - 1][0]),
                last_words(p0, c3[i], keys[kPhiloxRounds - 1][1])};
  }
}

// Index, in its 128-bit lane, of the byte that becomes byte i of the packed codes.
template <int kBits>
constexpr int packed_byte(int i) {
  const int lane = i / kBits, byte = i % kBits;
  return (lane * 8 + (kBits == 4 ? 2 * byte : kBits == 2 ? 4 * byte : byte)) % 16;
}

// Writes 32 codes of b bits as 4 * b bytes.
template <int kBits>
MMC_TARGET_INLINE void store_packed(__m256i codes, uint8_t* packed) {
  if constexpr (kBits == 8) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed), codes);
  } else {
    static constexpr auto kPacked =
        byte_index<32>([](int i) { return packed_byte<kBits>(i % 16); });
    // Codes are signed and weights unsigned here: a weight may be 128, a code below 8 bits may not.
    __m256i joined = _mm256_maddubs_epi16(_mm256_set1_epi16(1 << (8 + kBits) | 1), codes);
    if constexpr (kBits != 4) {
      joined = _mm256_madd_epi16(joined, _mm256_set1_epi32(1 << (16 + 2 * kBits) | 1));
    }
    if constexpr (kBits != 4 && kBits != 2) {
      constexpr int kGap = 32 - 4 * kBits;
      joined = _mm256_sllv_epi32(joined, _mm256_set1_epi64x(kGap));
      joined = _mm256_srli_epi64(joined, kGap);
    }
    alignas(32) uint8_t lanes[32];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes),
                       _mm256_shuffle_epi8(joined, load(kPacked.of)));
    std::memcpy(packed, lanes, 2 * kBits);
    std::memcpy(packed + 2 * kBits, lanes + 16, 2 * kBits);
  }
}

struct alignas(32) Shifts {
  uint32_t of[8];
};

template <int kBits>
constexpr Shifts code_shifts() {
  Shifts shifts{};
  for (int i = 0; i < 8; ++i) shifts.of[i] = i * kBits % 8;
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

}  // namespace
}  // namespace moe_comp
