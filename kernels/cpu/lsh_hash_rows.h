// The row kernels of hadamard_hash and dense_hash, in vectors of the compiler. A file includes this
// once for its instruction set, MMC_TARGET, and its number of lanes, kLanes.
#pragma once

#include <utility>

#include "lsh_hash.h"

#define MMC_TARGET_INLINE MMC_TARGET __attribute__((always_inline)) inline

namespace moe_comp {
namespace {

// Buffers are aligned, but nothing depends on it.
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
using Lanes = std::make_index_sequence<kLanes>;

static_assert(kMaxLanes % kLanes == 0 && kDenseColumns % (2 * kLanes) == 0);

MMC_TARGET_INLINE Vector& vector_at(float* values) { return *reinterpret_cast<Vector*>(values); }

MMC_TARGET_INLINE const Vector& vector_at(const float* values) {
  return *reinterpret_cast<const Vector*>(values);
}

// A stage of the transform whose pairs are kHalf lanes apart: a + b to the first, a - b to the
// second.
template <int kHalf, size_t... kLane>
MMC_TARGET_INLINE Vector lane_stage(Vector x, std::index_sequence<kLane...>) {
  const Vector others = {x[kLane ^ kHalf]...};
  const Vector signs = {(kLane & kHalf ? -1.0f : 1.0f)...};
  return others + signs * x;
}

template <int kHalf>
MMC_TARGET_INLINE Vector lane_stages(Vector x, int64_t size) {
  if constexpr (kHalf < kLanes) {
    if (kHalf < size) x = lane_stages<2 * kHalf>(lane_stage<kHalf>(x, Lanes()), size);
  }
  return x;
}

// Transforms every `size` values of `count`; what is behind them up to a whole vector is not read
// as a number.
MMC_TARGET_INLINE void walsh_hadamard(float* values, int64_t count, int64_t size) {
  for (int64_t i = 0; i < count; i += kLanes) {
    vector_at(values + i) = lane_stages<1>(vector_at(values + i), size);
  }
  int64_t half = kLanes;
  for (; 2 * half < size; half *= 4) {  // two stages at a time
    for (int64_t first = 0; first < count; first += 4 * half) {
      for (int64_t i = first; i < first + half; i += kLanes) {
        float* const at = values + i;
        const Vector a = vector_at(at), b = vector_at(at + half);
        const Vector c = vector_at(at + 2 * half), d = vector_at(at + 3 * half);
        const Vector ab = a + b, cd = c + d, a_b = a - b, c_d = c - d;
        vector_at(at) = ab + cd;
        vector_at(at + half) = a_b + c_d;
        vector_at(at + 2 * half) = ab - cd;
        vector_at(at + 3 * half) = a_b - c_d;
      }
    }
  }
  if (half >= size) return;
  for (int64_t first = 0; first < count; first += 2 * half) {
    for (int64_t i = first; i < first + half; i += kLanes) {
      const Vector a = vector_at(values + i), b = vector_at(values + i + half);
      vector_at(values + i) = a + b;
      vector_at(values + i + half) = a - b;
    }
  }
}

template <typename T>
MMC_TARGET void rotate(const T* row, int64_t hidden, const float* signs, int64_t rotations,
                       int64_t size, float* coordinates) {
  for (int diagonal = 0; diagonal < kDiagonals; ++diagonal) {
    for (int64_t r = 0; r < rotations; ++r) {
      const float* const factors = signs + (r * kDiagonals + diagonal) * size;
      float* const values = coordinates + r * size;
      if (diagonal == 0) {
        for (int64_t i = 0; i < hidden; ++i) values[i] = to_float(row[i]) * factors[i];
        for (int64_t i = hidden; i < size; ++i) values[i] = 0.0f * factors[i];
      } else {
        for (int64_t i = 0; i < size; ++i) values[i] *= factors[i];
      }
    }
    walsh_hadamard(coordinates, rotations * size, size);
  }
}

MMC_TARGET void project(const float* columns, int64_t hidden, const float* directions,
                        float* coordinates, int64_t stride) {
  for (int64_t first = 0; first < kDenseColumns; first += 2 * kLanes) {
    Vector sums[kDenseRows][2] = {};
    for (int64_t k = 0; k < hidden; ++k) {
      const float* const direction = directions + k * kDenseColumns + first;
      const Vector low = vector_at(direction), high = vector_at(direction + kLanes);
#pragma GCC unroll 4
      for (int row = 0; row < kDenseRows; ++row) {
        sums[row][0] += columns[k * kDenseRows + row] * low;
        sums[row][1] += columns[k * kDenseRows + row] * high;
      }
    }
#pragma GCC unroll 4
    for (int row = 0; row < kDenseRows; ++row) {
      vector_at(coordinates + row * stride + first) = sums[row][0];
      vector_at(coordinates + row * stride + first + kLanes) = sums[row][1];
    }
  }
}

MMC_TARGET int64_t key(const float* coordinates, int64_t num_coordinates, int64_t block_size,
                       int64_t row) {
  uint64_t key = kFirstKey;
  bool finite = true;
  for (int64_t first = 0; first < num_coordinates;) {
    const int64_t left = num_coordinates - first;
    const int size = static_cast<int>(left < block_size ? left : block_size);
    int64_t largest = 0;
    for (int i = 0; i < size; ++i) {
      const int64_t candidate = candidate_of(coordinates[first + i], i);
      largest = candidate > largest ? candidate : largest;
    }
    finite &= is_finite_candidate(largest);
    key = mixed_key(key, code_of_candidate(largest));
    first += size;
  }
  return finite ? hashed_key(key) : own_key(row);
}

template <typename T>
constexpr LshHash<T> kLshHash = {rotate<T>, project, key};

}  // namespace
}  // namespace moe_comp
