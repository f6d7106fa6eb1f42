// Bytes of a message in shared memory. They keep their offset from a multiple of 16 bytes, so that
// all but the first and the last few move 16 at a time, wherever in the message they are.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "tiles.cuh"

namespace moe_comp {

// Shared memory for `kNumBytes` bytes at any offset, and a vector that reading the last of them may
// touch.
template <int kNumBytes>
using Stage = uint4[(kNumBytes + 2 * sizeof(uint4) - 2) / sizeof(uint4) + 1];

// Where in its stage the byte at `target` is.
__device__ inline int stage_offset(const uint8_t* target) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(target) % sizeof(uint4));
}

// Copies bytes from the message; all threads of a block call it and synchronize behind it.
__device__ inline void copy_in(uint4* stage, const uint8_t* source, int num_bytes) {
  const int first = stage_offset(source), last = first + num_bytes;
  const uint8_t* aligned = source - first;
  constexpr int kVector = sizeof(uint4);
  for (int at = threadIdx.x * kVector; at < last; at += kThreads * kVector) {
    if (at >= first && at + kVector <= last) {
      stage[at / kVector] = __ldg(reinterpret_cast<const uint4*>(aligned + at));
    } else {
      const int begin = at < first ? first : at, end = at + kVector < last ? at + kVector : last;
#pragma unroll 1
      for (int i = begin; i < end; ++i) reinterpret_cast<uint8_t*>(stage)[i] = aligned[i];
    }
  }
}

// Copies bytes to the message; all threads of a block synchronize and call it.
__device__ inline void copy_out(uint8_t* target, const uint4* stage, int num_bytes) {
  const int first = stage_offset(target), last = first + num_bytes;
  uint8_t* aligned = target - first;
  constexpr int kVector = sizeof(uint4);
  for (int at = threadIdx.x * kVector; at < last; at += kThreads * kVector) {
    if (at >= first && at + kVector <= last) {
      *reinterpret_cast<uint4*>(aligned + at) = stage[at / kVector];
    } else {
      const int begin = at < first ? first : at, end = at + kVector < last ? at + kVector : last;
#pragma unroll 1
      for (int i = begin; i < end; ++i) aligned[i] = reinterpret_cast<const uint8_t*>(stage)[i];
    }
  }
}

// Puts the low `num_bytes` bytes, at most 8, of `bytes` at any offset of a stage.
__device__ inline void put_bytes(uint4* stage, int offset, uint64_t bytes, int num_bytes) {
  uint8_t* target = reinterpret_cast<uint8_t*>(stage) + offset;
  if ((offset | num_bytes) % 4 == 0) {
    uint32_t* words = reinterpret_cast<uint32_t*>(target);
    words[0] = static_cast<uint32_t>(bytes);
    if (num_bytes > 4) words[1] = static_cast<uint32_t>(bytes >> 32);
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (i < num_bytes) target[i] = static_cast<uint8_t>(bytes >> 8 * i);
    }
  }
}

// The 32 bits that begin at bit `bit` of a stage; touches up to four bytes behind them.
__device__ inline uint32_t get_bits(const uint4* stage, uint32_t bit) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(stage) + bit / 32;
  const uint64_t pair = uint64_t{words[1]} << 32 | words[0];
  return static_cast<uint32_t>(pair >> bit % 32);
}

}  // namespace moe_comp
