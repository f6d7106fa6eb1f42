// The types of rows. Values travel as bits in 32-bit words, one float32 or two 16-bit values each,
// and become float for arithmetic. Without their sign, bits are ordered like the values, so the
// largest of many is found among the bits, which for 16-bit values are the upper half of a word.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../quantize_math.cuh"

namespace moe_comp {

__device__ inline uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// The larger of `largest` and the magnitudes of two 16-bit values, in the upper half.
__device__ inline uint32_t larger_of_halves(uint32_t largest, uint32_t word) {
  const uint32_t magnitudes = word & 0x7fff7fffu;
  return larger(larger(largest, magnitudes), magnitudes << 16);
}

struct Float32 {
  using Bits = uint32_t;

  static __device__ uint32_t absmax(uint32_t largest, uint32_t word) {
    return larger(largest, word & 0x7fffffffu);
  }
  static __device__ uint32_t float32_bits(uint32_t largest) { return largest; }

  static __device__ float value(const uint32_t* words, int i) { return bits_float(words[i]); }
  static __device__ float packed(const float* values) { return values[0]; }
  static __device__ Bits bits(float value) { return float_bits(value); }
};

struct Bfloat16 {
  using Bits = uint16_t;

  static __device__ uint32_t absmax(uint32_t largest, uint32_t word) {
    return larger_of_halves(largest, word);
  }
  static __device__ uint32_t float32_bits(uint32_t largest) { return largest & 0xffff0000u; }

  static __device__ float value(const uint32_t* words, int i) {
    return bits_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
  }
  static __device__ __nv_bfloat162 packed(const float* values) {
    return __floats2bfloat162_rn(values[0], values[1]);
  }
  static __device__ Bits bits(float value) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  }
};

struct Float16 {
  using Bits = uint16_t;

  static __device__ uint32_t absmax(uint32_t largest, uint32_t word) {
    return larger_of_halves(largest, word);
  }
  static __device__ uint32_t float32_bits(uint32_t largest) {
    return float_bits(__half2float(__ushort_as_half(static_cast<Bits>(largest >> 16))));
  }

  static __device__ float value(const uint32_t* words, int i) {
    return __half2float(__ushort_as_half(static_cast<Bits>(words[i / 2] >> i % 2 * 16)));
  }
  static __device__ __half2 packed(const float* values) {
    return __floats2half2_rn(values[0], values[1]);
  }
  static __device__ Bits bits(float value) { return __half_as_ushort(__float2half_rn(value)); }
};

}  // namespace moe_comp
