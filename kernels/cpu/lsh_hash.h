// The row kernels of hadamard_hash and dense_hash, one table of functions per instruction set and
// row type.
#pragma once

#include <cstdint>

#include "../hash_math.cuh"
#include "row_types.h"

namespace moe_comp {

constexpr int kDenseRows = 4;      // that dense_hash projects at once
constexpr int kDenseColumns = 32;  // directions that lie together; every vector divides it
constexpr int kMaxLanes = 16;      // of any vector

template <typename T>
struct LshHash {
  // Writes the `rotations` * `size` coordinates of a row; `coordinates` has room for a multiple of
  // kMaxLanes. `signs` are [rotations, kDiagonals, size].
  void (*rotate)(const T* row, int64_t hidden, const float* signs, int64_t rotations, int64_t size,
                 float* coordinates);
  // Writes kDenseColumns coordinates of each of kDenseRows rows, `stride` apart. `columns` are the
  // rows' values, [hidden, kDenseRows]; `directions` are [hidden, kDenseColumns].
  void (*project)(const float* columns, int64_t hidden, const float* directions, float* coordinates,
                  int64_t stride);
  // Returns the key of a row with these coordinates.
  int64_t (*key)(const float* coordinates, int64_t num_coordinates, int64_t block_size,
                 int64_t row);
};

template <typename T>
const LshHash<T>& lsh_hash_generic();
template <typename T>
const LshHash<T>& lsh_hash_avx2();
template <typename T>
const LshHash<T>& lsh_hash_avx512();

}  // namespace moe_comp
