// The two row types that kernels read and write themselves: float, and bfloat16 without torch.
#pragma once

#include "../quantize_math.cuh"

namespace moe_comp {

struct Bf16 {
  uint16_t bits;
};

// NaN as torch's vectorised conversion writes it.
constexpr uint16_t kBf16NanBits = 0xffff;

inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

// |x| as the bits of a float32.
template <typename T>
inline uint32_t magnitude_bits(T x) {
  return float_bits(to_float(x)) & 0x7fffffffu;
}

// x as a T, rounded to nearest, ties to even.
template <typename T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

template <>
inline Bf16 from_float<Bf16>(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffffu) > kInfBits) return {kBf16NanBits};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}

}  // namespace moe_comp
