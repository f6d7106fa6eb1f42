// The arithmetic of gaussian_pack and gaussian_unpack, once for every kernel, like
// quantize_math.cuh; megatron_moe_comp/ops/gaussian.py says what it computes.
#pragma once

#include <cmath>
#include <cstdint>

#include "quantize_math.cuh"

namespace moe_comp {

constexpr int kMaxGaussianBits = 4;
constexpr int kMaxLevels = 1 << kMaxGaussianBits;
constexpr int kGaussianScaleBytes = 2;  // a bfloat16
constexpr float kCells = 50.0f;
constexpr int kSumLanes = 32;
constexpr int kSumColumns = 1024;  // whose squares are added up before those of the next

struct GaussianLevels {
  float magnitudes[kMaxLevels / 2];
  int8_t thresholds[kMaxLevels / 2 - 1];
};

// Of 2, 3 and 4 bits.
constexpr GaussianLevels kGaussianLevels[] = {
    {{0.512579519f, 1.709901215f}, {49}},
    {{0.2525893769f, 0.779124595f, 1.385007219f, 2.217754118f}, {25, 52, 87}},
    {{0.1296214479f, 0.3917549027f, 0.6630324239f, 0.9513416097f, 1.268230607f, 1.633501823f,
      2.088780297f, 2.758691026f},
     {13, 26, 40, 55, 72, 92, 120}},
};

// How many thresholds a cell from 0 on has reached.
template <int kBits>
constexpr int index_of_cell(int cell) {
  int index = 0;
  for (int i = 0; i < (1 << (kBits - 1)) - 1; ++i) {
    index += cell >= kGaussianLevels[kBits - 2].thresholds[i];
  }
  return index;
}

// The bits of a row's scale, a bfloat16, from its sum of squares.
MMC_INLINE uint16_t rms_bits(double sum, int64_t hidden) {
#if defined(__CUDA_ARCH__)
  const double mean = __ddiv_rn(sum, static_cast<double>(hidden));
  const uint32_t bits = float_bits(__double2float_rn(__dsqrt_rn(mean)));
#else
  const double mean = sum / static_cast<double>(hidden);
  const uint32_t bits = float_bits(static_cast<float>(std::sqrt(mean)));
#endif
  if ((bits & 0x7fffffffu) >= kInfBits) return kNanBits >> 16;
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  if (rounded >= kInfBits >> 16) return (kInfBits >> 16) - 1;
  return bits_float(rounded << 16) < kSmallestScale ? 0 : static_cast<uint16_t>(rounded);
}

// The sum with one more square, which is exact.
MMC_INLINE double add_square(double sum, float x) {
  const double value = x;
#if defined(__CUDA_ARCH__)
  return __dadd_rn(sum, __dmul_rn(value, value));
#else
  return sum + value * value;
#endif
}

MMC_INLINE double add_sums(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}

MMC_INLINE float scale_of_bits(uint16_t bits) {
  return bits_float(static_cast<uint32_t>(bits) << 16);
}

// What turns a value into cells.
MMC_INLINE float cells_per_unit(float scale) { return div_rn(kCells, scale); }

// The cell of a value, as far as it fits a signed byte.
MMC_INLINE int cell_of(float x, float per_unit) {
#if defined(__CUDA_ARCH__)
  const float cell = floorf(mul_rn(x, per_unit));
#else
  const float cell = std::floor(x * per_unit);
#endif
  return static_cast<int>(cell < -128.0f ? -128.0f : cell > 127.0f ? 127.0f : cell);
}

}  // namespace moe_comp
