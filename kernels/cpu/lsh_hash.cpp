// The CPU kernels of hadamard_hash and dense_hash; megatron_moe_comp/ops/lsh_hash.py says what they
// compute.
#include "lsh_hash.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../hash_checks.h"
#include "isa.h"
#include "segments.h"

namespace moe_comp {
namespace {

template <typename T>
const LshHash<T>& kernels_of(Isa isa) {
#if MMC_X86
  if (isa == Isa::kAvx512) return lsh_hash_avx512<T>();
  if (isa == Isa::kAvx2) return lsh_hash_avx2<T>();
#endif
  return lsh_hash_generic<T>();
}

int64_t rounded_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Calls `hash(rows of the type they have, keys)`; those of other types become float32.
template <typename Hash>
at::Tensor hashed(const at::Tensor& rows, const Hash& hash) {
  const at::Tensor keys = at::empty({rows.size(0)}, rows.options().dtype(at::kLong));
  int64_t* const target = keys.mutable_data_ptr<int64_t>();
  if (rows.scalar_type() == at::kBFloat16) {
    hash(static_cast<const Bf16*>(rows.const_data_ptr()), target);
  } else {
    const at::Tensor float_rows = rows.to(at::kFloat);
    hash(float_rows.const_data_ptr<float>(), target);
  }
  return keys;
}

at::Tensor hadamard_hash(const at::Tensor& rows, const at::Tensor& signs, int64_t num_coordinates,
                         int64_t block_size) {
  check_hadamard(rows, signs, num_coordinates, block_size);
  const at::Tensor factors = signs.contiguous();
  const float* const all_factors = factors.const_data_ptr<float>();
  const int64_t hidden = rows.size(1), size = signs.size(2);
  const int64_t rotations = (num_coordinates + size - 1) / size;
  const int64_t count = rotations * size;
  const int64_t grain = std::max<int64_t>(1, kGrainValues / count);
  return hashed(rows, [&]<typename T>(const T* values, int64_t* keys) {
    const LshHash<T>& kernels = kernels_of<T>(selected_isa());
    at::parallel_for(0, rows.size(0), grain, [&](int64_t begin, int64_t end) {
      const at::Tensor buffer = at::zeros({rounded_up(count, kMaxLanes)}, at::kFloat);
      float* const coordinates = buffer.mutable_data_ptr<float>();
      for (int64_t row = begin; row < end; ++row) {
        kernels.rotate(values + row * hidden, hidden, all_factors, rotations, size, coordinates);
        keys[row] = kernels.key(coordinates, num_coordinates, block_size, row);
      }
    });
  });
}

// The first directions in groups of kDenseColumns, [groups, hidden, kDenseColumns], zeros behind
// the last one.
at::Tensor grouped(const at::Tensor& directions, int64_t num_coordinates) {
  const int64_t hidden = directions.size(0);
  const int64_t groups = rounded_up(num_coordinates, kDenseColumns) / kDenseColumns;
  const at::Tensor padded = at::zeros({hidden, groups * kDenseColumns}, directions.options());
  padded.narrow(1, 0, num_coordinates).copy_(directions.narrow(1, 0, num_coordinates));
  return padded.view({hidden, groups, kDenseColumns}).transpose(0, 1).contiguous();
}

at::Tensor dense_hash(const at::Tensor& rows, const at::Tensor& directions, int64_t num_coordinates,
                      int64_t block_size) {
  check_dense(rows, directions, num_coordinates, block_size);
  const at::Tensor groups = grouped(directions, num_coordinates);
  const float* const all_groups = groups.const_data_ptr<float>();
  const int64_t num_rows = rows.size(0), hidden = rows.size(1);
  const int64_t stride = groups.size(0) * kDenseColumns;
  return hashed(rows, [&]<typename T>(const T* values, int64_t* keys) {
    const LshHash<T>& kernels = kernels_of<T>(selected_isa());
    const int64_t num_tiles = rounded_up(num_rows, kDenseRows) / kDenseRows;
    const int64_t grain = std::max<int64_t>(1, kGrainValues / kDenseRows / (hidden + stride));
    at::parallel_for(0, num_tiles, grain, [&](int64_t begin, int64_t end) {
      const at::Tensor buffers = at::zeros({kDenseRows * (hidden + stride)}, at::kFloat);
      float* const coordinates = buffers.mutable_data_ptr<float>();
      float* const columns = coordinates + kDenseRows * stride;
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t first = tile * kDenseRows;
        const int64_t count = std::min<int64_t>(kDenseRows, num_rows - first);
        for (int64_t i = 0; i < count; ++i) {
          const T* const row = values + (first + i) * hidden;
          for (int64_t k = 0; k < hidden; ++k) columns[k * kDenseRows + i] = to_float(row[k]);
        }
        for (int64_t at = 0; at < stride; at += kDenseColumns) {
          kernels.project(columns, hidden, all_groups + at * hidden, coordinates + at, stride);
        }
        for (int64_t i = 0; i < count; ++i) {
          keys[first + i] =
              kernels.key(coordinates + i * stride, num_coordinates, block_size, first + i);
        }
      }
    });
  });
}

}  // namespace
}  // namespace moe_comp

TORCH_LIBRARY_IMPL(megatron_moe_comp, CPU, library) {
  library.impl("hadamard_hash", moe_comp::hadamard_hash);
  library.impl("dense_hash", moe_comp::dense_hash);
}
