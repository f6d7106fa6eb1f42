// What every device checks of the arguments of hadamard_hash and dense_hash before a kernel runs.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "hash_math.cuh"

namespace moe_comp {

inline void check_hash(const at::Tensor& rows, const at::Tensor& rotation, int64_t available,
                       int64_t num_coordinates, int64_t block_size) {
  TORCH_CHECK_VALUE(rotation.scalar_type() == at::kFloat && rotation.device() == rows.device(),
                    "the rotation must be float32 on ", rows.device(), ", not ",
                    rotation.scalar_type(), " on ", rotation.device());
  TORCH_CHECK_VALUE(1 <= num_coordinates && num_coordinates <= available && available <= INT32_MAX,
                    "num_coordinates must be 1 to ", available, ", not ", num_coordinates);
  TORCH_CHECK_VALUE(block_size >= 1, "block_size must be at least 1, not ", block_size);
}

inline void check_rows(const at::Tensor& rows) {
  TORCH_CHECK_VALUE(rows.dim() == 2 && rows.is_contiguous() && rows.is_floating_point(),
                    "rows must be contiguous [N, H] of a floating-point dtype, not ",
                    rows.scalar_type(), " ", rows.sizes(), " with strides ", rows.strides());
}

// Throws a ValueError that names the value and the requirement unless the arguments fit together.
inline void check_hadamard(const at::Tensor& rows, const at::Tensor& signs, int64_t num_coordinates,
                           int64_t block_size) {
  check_rows(rows);
  const int64_t size = signs.dim() == 3 ? signs.size(2) : 0;
  TORCH_CHECK_VALUE(size >= 1 && size >= rows.size(1) && (size & (size - 1)) == 0 &&
                        signs.size(1) == kDiagonals,
                    "signs must be [rotations, ", kDiagonals, ", P] with P a power of two from ",
                    rows.size(1), " on, not ", signs.sizes());
  check_hash(rows, signs, signs.size(0) * size, num_coordinates, block_size);
}

// Throws a ValueError that names the value and the requirement unless the arguments fit together.
inline void check_dense(const at::Tensor& rows, const at::Tensor& directions,
                        int64_t num_coordinates, int64_t block_size) {
  check_rows(rows);
  TORCH_CHECK_VALUE(directions.dim() == 2 && directions.size(0) == rows.size(1),
                    "directions must have a row per column of ", rows.sizes(), ", not be ",
                    directions.sizes());
  check_hash(rows, directions, directions.size(1), num_coordinates, block_size);
}

}  // namespace moe_comp
