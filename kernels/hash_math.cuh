// The arithmetic of the keys of hadamard_hash and dense_hash, once for every kernel, as
// quantize_math.cuh is for theirs. megatron_moe_comp/ops/lsh_hash.py says what it computes.
#pragma once

#include "quantize_math.cuh"

namespace moe_comp {

constexpr int kHashBits = 48;
constexpr int kDiagonals = 3;  // of a Walsh-Hadamard pseudo-rotation
constexpr uint64_t kFirstKey = 0x9e3779b97f4a7c15u;
constexpr uint64_t kKeyMultiplier = 0xff51afd7ed558ccdu;

// Coordinate `index` of a block as an integer: the largest one of a block is that of the coordinate
// of largest magnitude, of several the first. It ends in the complement of the code.
MMC_INLINE int64_t candidate_of(float x, uint32_t index) {
  const uint32_t magnitude = float_bits(x) & 0x7fffffffu, code = 2 * index + (x < 0.0f);
  return static_cast<int64_t>(uint64_t{magnitude} << 32 | ~code);
}

MMC_INLINE uint32_t code_of_candidate(int64_t candidate) {
  return ~static_cast<uint32_t>(candidate);
}

MMC_INLINE bool is_finite_candidate(int64_t candidate) { return candidate >> 32 < kInfBits; }

MMC_INLINE uint64_t mixed_key(uint64_t key, uint32_t code) {
  key = (key ^ code) * kKeyMultiplier;
  return key ^ key >> 32;
}

// The key that only this row has.
MMC_INLINE int64_t own_key(int64_t row) { return (int64_t{1} << kHashBits) + row; }

// The key of a row whose codes have all been mixed.
MMC_INLINE int64_t hashed_key(uint64_t key) {
  return static_cast<int64_t>(key >> (64 - kHashBits));
}

}  // namespace moe_comp
