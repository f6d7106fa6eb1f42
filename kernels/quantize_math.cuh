// The arithmetic of quantize_pack and its decoders, once for every kernel: nvcc compiles it for
// the device, g++ for the C++ kernels. megatron_moe_comp/ops/ says what it computes; the bytes are
// the same everywhere, so each float operation rounds once (no fused multiply-add, no fast math).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MMC_INLINE __host__ __device__ __forceinline__
#else
#define MMC_INLINE inline
#endif

namespace moe_comp {

constexpr int kMinBits = 2;
constexpr int kMaxBits = 8;
constexpr int kSegmentFields = 5;  // integers per segment, as in megatron_moe_comp/ops/segments.py
constexpr float kSmallestScale = 0x1p-100f;
constexpr float kOne = 65536.0f;  // 1 in the 16.16 fixed point in which values are rounded
constexpr uint32_t kNanBits = 0x7fc00000u;
constexpr uint32_t kInfBits = 0x7f800000u;

MMC_INLINE uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

MMC_INLINE float bits_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

MMC_INLINE float mul_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

MMC_INLINE float add_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

MMC_INLINE float div_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

MMC_INLINE int levels(int num_bits) { return (1 << (num_bits - 1)) - 1; }

// The outermost level in 16.16 fixed point. Mid-rise levels are odd multiples of half a step.
MMC_INLINE float top_of(int num_bits, bool mid_rise) {
  return (levels(num_bits) + (mid_rise ? 0.5f : 0.0f)) * kOne;
}

MMC_INLINE int64_t packed_bytes(int64_t num_values, int num_bits) {
  return (num_values * num_bits + 7) / 8;
}

// The scale of a row from the largest bit pattern of its magnitudes (sign bit cleared): as integers
// they are ordered like the floats, with infinity and NaN on top.
MMC_INLINE float scale_from_absmax_bits(uint32_t bits) {
  return bits_float(bits >= kInfBits ? kNanBits : bits);
}

// False for a row whose codes are all L: tiny, infinite or NaN scale.
MMC_INLINE bool is_usable(float scale) {
  return scale >= kSmallestScale && float_bits(scale) < kInfBits;
}

// What turns a value into 16.16 fixed point; rounded down where it was rounded up, so that no
// |x| <= scale passes the top level.
MMC_INLINE float inverse_of(float scale, float top) {
  const float inverse = div_rn(top, scale);
  return mul_rn(inverse, scale) > top ? bits_float(float_bits(inverse) - 1) : inverse;
}

// The code, in [0, 2 * top / kOne], of x with sixteen random bits. |x| <= scale keeps the sum in
// [0, 2 * top], below 2^24, where adding and removing 2^23 rounds to an integer; converting with
// rounding to nearest does the same.
MMC_INLINE uint32_t code_of(float x, float inverse, float top, uint32_t random_half) {
  const float shifted = add_rn(mul_rn(x, inverse), top);
#if defined(__CUDA_ARCH__)
  const int fixed_point = __float2int_rn(shifted);
#else
  const int fixed_point = static_cast<int>(__builtin_nearbyintf(shifted));
#endif
  return static_cast<uint32_t>(fixed_point + static_cast<int>(random_half)) >> 16;
}

// The step between two levels; NaN stays NaN.
MMC_INLINE float step_of(float scale, int num_bits) {
  return div_rn(scale < kSmallestScale ? 0.0f : scale, static_cast<float>(levels(num_bits)));
}

MMC_INLINE float value_of(uint32_t code, float step, int num_bits) {
  return mul_rn(static_cast<float>(static_cast<int>(code) - levels(num_bits)), step);
}

// The step between two mid-rise levels, over kOne; NaN stays NaN.
MMC_INLINE float dithered_unit_of(float scale, int num_bits) {
  return div_rn(scale < kSmallestScale ? 0.0f : scale, top_of(num_bits, true));
}

// The value of a mid-rise code in whose rounding `random_half` was added: less that and the top
// level, and half a step for the fraction that was dropped; these two make L. At most 24 bits.
MMC_INLINE float dithered_value_of(uint32_t code, uint32_t random_half, float unit, int num_bits) {
  const int fixed_point =
      (static_cast<int>(code) - levels(num_bits)) * 65536 - static_cast<int>(random_half);
  return mul_rn(static_cast<float>(fixed_point), unit);
}

// x, or the largest value of its sign if it is beyond; NaN stays NaN.
MMC_INLINE float saturated(float x, float largest) {
  return x > largest ? largest : x < -largest ? -largest : x;
}

// Philox4x32-10 (Salmon et al., SC 2011) at counter (group, row, offset, stream). Column 8g + 2j
// takes the low half of word j, column 8g + 2j + 1 its high half.
MMC_INLINE void philox4x32(uint32_t group, uint32_t row, uint32_t offset, uint32_t stream,
                           uint64_t key, uint32_t words[4]) {
  uint32_t c0 = group, c1 = row, c2 = offset, c3 = stream;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

}  // namespace moe_comp
