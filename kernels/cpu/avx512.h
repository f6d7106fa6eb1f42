// What the AVX-512 kernels share: random numbers and codes of 64 columns.
#pragma once

#include <immintrin.h>

#include "lanes.h"
#include "philox.h"

#define MMC_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")))
#define MMC_TARGET_INLINE MMC_TARGET __attribute__((always_inline)) inline

namespace moe_comp {
namespace {

constexpr int kColumns = 64;
constexpr int kGroups = kColumns / 8;
constexpr int kBlocks = 4;  // of columns, whose Philox calls are interleaved
constexpr int kXor3 = 0x96;
constexpr __mmask64 kAll = ~__mmask64{0};

constexpr __mmask64 first_bytes(int64_t num_bytes) {
  return num_bytes >= 64 ? kAll : (__mmask64{1} << num_bytes) - 1;
}

// Groups g..g+3 in the even lanes, g+4..g+7 in the odd ones: unpacklo and unpackhi then give the
// words of four groups in order.
alignas(64) constexpr uint64_t kGroupOfLane[kGroups] = {0, 4, 1, 5, 2, 6, 3, 7};

// The random halves of 64 columns, sixteen bits each, in order.
struct Halves {
  __m512i low;   // columns 0 to 31
  __m512i high;  // columns 32 to 63
};

MMC_TARGET_INLINE __m512i high_words(__m512i products) { return _mm512_srli_epi64(products, 32); }

MMC_TARGET_INLINE __m512i xor3(__m512i a, __m512i b, const uint64_t* key) {
  return _mm512_ternarylogic_epi64(a, b, _mm512_load_si512(key), kXor3);
}

// New (c0, c1), or (c2, c3), of the last round as the (low, high) half of each lane: a product with
// its halves swapped, but for what is xored to its high word.
MMC_TARGET_INLINE __m512i last_words(__m512i products, __m512i word, const uint64_t* key) {
  return _mm512_mask_ternarylogic_epi32(_mm512_rol_epi64(products, 32), 0x5555, word,
                                        _mm512_load_si512(key), kXor3);
}

// The random halves of some blocks of columns, from `groups` on. Their Philox calls are
// interleaved, since one is a chain of dependent multiplications. A counter word is the low half of
// a 64-bit lane; whatever is above it, vpmuludq ignores.
template <int kNumBlocks>
MMC_TARGET_INLINE void random_halves(__m512i groups, const PhiloxRow& row,
                                     const RandomStream& random, Halves (&halves)[kNumBlocks]) {
  const __m512i m0 = _mm512_set1_epi64(kPhiloxMultiplier0);
  const __m512i m1 = _mm512_set1_epi64(kPhiloxMultiplier1);
  const auto& keys = random.round_keys;
  __m512i c0[kNumBlocks], c1[kNumBlocks], c2[kNumBlocks], c3[kNumBlocks];
#pragma GCC unroll 4
  for (int i = 0; i < kNumBlocks; ++i) {
    __m512i p0 = _mm512_mul_epu32(groups, m0);
    c2[i] = _mm512_xor_si512(high_words(p0), _mm512_set1_epi64(row.round1_c2));
    __m512i p1 = _mm512_mul_epu32(c2[i], m1);
    c0[i] = _mm512_xor_si512(high_words(p1), _mm512_set1_epi64(row.round2_c0));
    c1[i] = p1;
    c2[i] = _mm512_xor_si512(p0, _mm512_set1_epi64(row.round2_c2));
    p0 = _mm512_mul_epu32(c0[i], m0);
    p1 = _mm512_mul_epu32(c2[i], m1);
    c0[i] = xor3(high_words(p1), c1[i], keys[2][0]);
    c1[i] = p1;
    c2[i] = _mm512_xor_si512(high_words(p0), _mm512_set1_epi64(row.round3_c2));
    c3[i] = p0;
    groups = _mm512_add_epi64(groups, _mm512_set1_epi64(kGroups));
  }
#pragma GCC unroll 8
  for (int round = 3; round < kPhiloxRounds - 1; ++round) {
#pragma GCC unroll 4
    for (int i = 0; i < kNumBlocks; ++i) {
      const __m512i p0 = _mm512_mul_epu32(c0[i], m0);
      const __m512i p1 = _mm512_mul_epu32(c2[i], m1);
      c0[i] = xor3(high_words(p1), c1[i], keys[round][0]);
      c1[i] = p1;
      c2[i] = xor3(high_words(p0), c3[i], keys[round][1]);
      c3[i] = p0;
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kNumBlocks; ++i) {
    const __m512i p0 = _mm512_mul_epu32(c0[i], m0);
    const __m512i p1 = _mm512_mul_epu32(c2[i], m1);
    const __m512i words01 = last_words(p1, c1[i], keys[kPhiloxRounds - 1][0]);
    const __m512i words23 = last_words(p0, c3[i], keys[kPhiloxRounds - 1][1]);
    halves[i] = {_mm512_unpacklo_epi64(words01, words23), _mm512_unpackhi_epi64(words01, words23)};
  }
}

// Index of the byte that becomes byte i of the packed codes: after `pack` has joined the codes of a
// 64-bit lane (b = 2 and 4: of its halves and quarters), the bytes in use move together.
template <int kBits>
constexpr int packed_byte(int i) {
  const int lane = i / kBits, byte = i % kBits;
  return (lane * 8 + (kBits == 4 ? 2 * byte : kBits == 2 ? 4 * byte : byte)) % 64;
}

// 64 codes of b bits as 8 * b bytes; the bytes behind them are undefined.
template <int kBits>
MMC_TARGET_INLINE __m512i pack(__m512i codes) {
  if constexpr (kBits == 8) {
    return codes;
  } else {
    static constexpr auto kPacked = byte_index<64>(packed_byte<kBits>);
    // Codes are signed and weights unsigned here: a weight may be 128, a code below 8 bits may not.
    __m512i joined = _mm512_maddubs_epi16(_mm512_set1_epi16(1 << (8 + kBits) | 1), codes);
    if constexpr (kBits != 4) {
      joined = _mm512_madd_epi16(joined, _mm512_set1_epi32(1 << (16 + 2 * kBits) | 1));
    }
    if constexpr (kBits != 4 && kBits != 2) {
      constexpr int kGap = 32 - 4 * kBits;
      joined = _mm512_sllv_epi32(joined, _mm512_set1_epi64(kGap));
      joined = _mm512_srli_epi64(joined, kGap);
    }
    return _mm512_permutexvar_epi8(_mm512_load_si512(kPacked.of), joined);
  }
}

// The 64 codes in 8 * b bytes, a byte each.
template <int kBits>
MMC_TARGET_INLINE __m512i unpack(__m512i packed) {
  if constexpr (kBits == 8) {
    return packed;
  } else {
    // The b bytes of eight codes to a 64-bit lane; then the eight bits at every multiple of b.
    static constexpr auto kSpread =
        byte_index<64>([](int i) { return i % 8 < kBits ? i / 8 * kBits + i % 8 : 0; });
    static constexpr auto kShift = byte_index<64>([](int i) { return i % 8 * kBits; });
    const __m512i lanes = _mm512_permutexvar_epi8(_mm512_load_si512(kSpread.of), packed);
    const __m512i codes = _mm512_multishift_epi64_epi8(_mm512_load_si512(kShift.of), lanes);
    return _mm512_and_si512(codes, _mm512_set1_epi8((1 << kBits) - 1));
  }
}

// x plus what makes its upper half that of the nearest bfloat16, ties to even.
MMC_TARGET_INLINE __m512i round_upper_half(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
}

}  // namespace
}  // namespace moe_comp
