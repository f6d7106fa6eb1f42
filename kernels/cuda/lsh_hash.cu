// hadamard_hash and dense_hash: float rows to the keys of their rotated coordinates. The contract is
// megatron_moe_comp/ops/lsh_hash.py.
//
// A block of threads has a tile of rows, whose coordinates are in shared memory: all rotations of a
// row side by side. A warp finds the code of a block of coordinates, a thread mixes those of a row.
#include "../hash_math.cuh"
#include "launchers.h"
#include "row_types.cuh"

// Shared memory of the size that the launch asks for.
#ifndef MMC_DYNAMIC_SHARED
#define MMC_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

namespace moe_comp {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;          // in a block; of dense_hash at most
constexpr int kBlocks = 4;             // of a multiprocessor: for fewer registers, some spill
constexpr int kTileValues = 2048;      // coordinates of the rows of a tile, if a row has fewer
constexpr int kStages = 3;             // of a transform between two barriers
constexpr int kDenseRows = 8;          // of a tile of dense_hash, whose sums are in registers
constexpr int kDenseColumns = 128;     // of these rows, in shared memory at once
constexpr int kFreeShared = 48 << 10;  // bytes that a block may have without asking

struct HashParams {
  const void* rows;
  const float* rotation;
  int64_t* keys;
  int64_t num_rows;
  int32_t hidden;
  int32_t columns;      // P of hadamard_hash, the columns of `directions` of dense_hash
  int32_t log_columns;  // of hadamard_hash
  int32_t num_coordinates;
  int32_t block_size;  // at most num_coordinates
  int32_t stride;      // between the coordinates of two rows
  int32_t rows_per_tile;
};

template <typename Row>
__device__ float value_at(const HashParams& p, int64_t row, int column) {
  const uint32_t word = static_cast<const typename Row::Bits*>(p.rows)[row * p.hidden + column];
  return Row::value(&word, 0);
}

__device__ inline int64_t first_row_of(const HashParams& p) {
  return int64_t{blockIdx.x} * p.rows_per_tile;
}

__device__ inline int num_rows_of(const HashParams& p) {
  const int64_t left = p.num_rows - first_row_of(p);
  return left < p.rows_per_tile ? static_cast<int>(left) : p.rows_per_tile;
}

// The largest candidate of a warp, at every lane.
__device__ inline int64_t warp_max(int64_t candidate) {
  const uint32_t upper = static_cast<uint32_t>(candidate >> 32);
  const uint32_t largest = __reduce_max_sync(0xffffffffu, upper);
  const uint32_t lower = upper == largest ? static_cast<uint32_t>(candidate) : 0;
  return static_cast<int64_t>(uint64_t{largest} << 32 | __reduce_max_sync(0xffffffffu, lower));
}

// Writes the keys of the rows of a tile; all threads synchronize and call it.
__device__ inline void write_keys(const HashParams& p, float* coordinates) {
  constexpr uint32_t kNotFinite = 0xffffffffu;  // what no code is
  const int num_rows = num_rows_of(p), lane = threadIdx.x % kWarp;
  const int blocks = (p.num_coordinates + p.block_size - 1) / p.block_size;
  for (int i = threadIdx.x / kWarp; i < num_rows * blocks; i += blockDim.x / kWarp) {
    const int first = i % blocks * p.block_size, left = p.num_coordinates - first;
    const int size = left < p.block_size ? left : p.block_size;
    float* const block = coordinates + i / blocks * p.stride + first;
    int64_t largest = 0;
    for (int j = lane; j < size; j += kWarp) {
      const int64_t candidate = candidate_of(block[j], j);
      largest = candidate > largest ? candidate : largest;
    }
    largest = warp_max(largest);
    // In place of the block's first coordinate, which only this lane has read.
    const uint32_t code = is_finite_candidate(largest) ? code_of_candidate(largest) : kNotFinite;
    if (lane == 0) block[0] = bits_float(code);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < num_rows; i += blockDim.x) {
    const int64_t row = first_row_of(p) + i;
    uint64_t key = kFirstKey;
    bool finite = true;
    for (int first = 0; first < p.num_coordinates; first += p.block_size) {
      const uint32_t code = float_bits(coordinates[i * p.stride + first]);
      finite &= code != kNotFinite;
      key = mixed_key(key, code);
    }
    p.keys[row] = finite ? hashed_key(key) : own_key(row);
  }
}

// Stages of the transforms of all `count` values, the first for pairs that are 1 << log_half apart.
template <int kNumStages>
__device__ void transform(float* values, int count, int log_half) {
  constexpr int kValues = 1 << kNumStages;
  const int half = 1 << log_half;
  for (int i = threadIdx.x; i < count >> kNumStages; i += kThreads) {
    float* const at = values + ((i >> log_half << (log_half + kNumStages)) | (i & (half - 1)));
    float x[kValues];
#pragma unroll
    for (int j = 0; j < kValues; ++j) x[j] = at[j * half];
#pragma unroll
    for (int stage = 1; stage < kValues; stage *= 2) {
#pragma unroll
      for (int j = 0; j < kValues; ++j) {
        if (j & stage) continue;
        const float a = x[j], b = x[j + stage];
        x[j] = add_rn(a, b);
        x[j + stage] = add_rn(a, -b);
      }
    }
#pragma unroll
    for (int j = 0; j < kValues; ++j) at[j * half] = x[j];
  }
  __syncthreads();
}

template <typename Row>
__global__ void __launch_bounds__(kThreads, kBlocks)
    hadamard_hash_kernel(const __grid_constant__ HashParams p) {
  MMC_DYNAMIC_SHARED(float, coordinates);
  const int count = num_rows_of(p) * p.stride, rotations = p.stride >> p.log_columns;
  for (int diagonal = 0; diagonal < kDiagonals; ++diagonal) {
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const int column = i & (p.columns - 1), transforms = i >> p.log_columns;
      const int sign = (transforms % rotations * kDiagonals + diagonal) * p.columns + column;
      const int64_t row = first_row_of(p) + transforms / rotations;
      const float value = diagonal > 0        ? coordinates[i]
                          : column < p.hidden ? value_at<Row>(p, row, column)
                                              : 0.0f;
      coordinates[i] = mul_rn(value, p.rotation[sign]);
    }
    __syncthreads();
    int log_half = 0;
    for (; log_half + kStages <= p.log_columns; log_half += kStages) {
      transform<kStages>(coordinates, count, log_half);
    }
    if (p.log_columns - log_half == 2) transform<2>(coordinates, count, log_half);
    if (p.log_columns - log_half == 1) transform<1>(coordinates, count, log_half);
  }
  write_keys(p, coordinates);
}

// A thread has the same coordinate of all rows of the tile, so that it reads each direction once.
template <typename Row>
__global__ void __launch_bounds__(kThreads, kBlocks)
    dense_hash_kernel(const __grid_constant__ HashParams p) {
  MMC_DYNAMIC_SHARED(float, coordinates);
  alignas(16) __shared__ float values[kDenseColumns][kDenseRows];
  const int num_rows = num_rows_of(p);
  for (int first = 0; first < p.num_coordinates; first += blockDim.x) {
    const int coordinate = first + threadIdx.x;
    const bool is_mine = coordinate < p.num_coordinates;
    float sums[kDenseRows] = {};
    for (int begin = 0; begin < p.hidden; begin += kDenseColumns) {
      const int left = p.hidden - begin, columns = left < kDenseColumns ? left : kDenseColumns;
      for (int i = threadIdx.x; i < kDenseRows * kDenseColumns; i += blockDim.x) {
        const int row = i / kDenseColumns, k = i % kDenseColumns;
        const bool exists = row < num_rows && k < columns;
        values[k][row] = exists ? value_at<Row>(p, first_row_of(p) + row, begin + k) : 0.0f;
      }
      __syncthreads();
      const float* direction = p.rotation + int64_t{begin} * p.columns + coordinate;
      for (int k = 0; is_mine && k < columns; ++k, direction += p.columns) {
#pragma unroll
        for (int i = 0; i < kDenseRows; ++i) {
          sums[i] = add_rn(sums[i], mul_rn(values[k][i], *direction));
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kDenseRows; ++i) {
      if (is_mine && i < num_rows) coordinates[i * p.stride + coordinate] = sums[i];
    }
  }
  __syncthreads();
  write_keys(p, coordinates);
}

// `stride` coordinates of a row are in shared memory; a tile has at most `max_rows`.
cudaError_t launch(void (*kernel)(HashParams), const HashCall& call, int64_t stride,
                   int64_t max_rows, int64_t threads, cudaStream_t stream) {
  if (call.hidden < 0 || call.hidden > kMaxHidden || call.columns > INT32_MAX || stride < 1 ||
      stride > kMaxCoordinates || call.num_coordinates < 1 || call.block_size < 1) {
    return cudaErrorInvalidValue;
  }
  const int64_t rows = kTileValues / stride;
  HashParams params = {};
  params.rows = call.rows;
  params.rotation = call.rotation;
  params.keys = call.keys;
  params.num_rows = call.num_rows;
  params.hidden = static_cast<int32_t>(call.hidden);
  params.columns = static_cast<int32_t>(call.columns);
  params.num_coordinates = static_cast<int32_t>(call.num_coordinates);
  while (params.log_columns < 30 && 1 << params.log_columns < params.columns) ++params.log_columns;
  const bool one_block = call.block_size > call.num_coordinates;
  params.block_size = static_cast<int32_t>(one_block ? call.num_coordinates : call.block_size);
  params.stride = static_cast<int32_t>(stride);
  params.rows_per_tile = static_cast<int32_t>(rows < 1 ? 1 : rows > max_rows ? max_rows : rows);
  const int64_t tiles = (call.num_rows + params.rows_per_tile - 1) / params.rows_per_tile;
  if (tiles == 0) return cudaSuccess;
  if (tiles > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<uint32_t>(tiles));
  config.blockDim = dim3(static_cast<uint32_t>(threads < kThreads ? threads : kThreads));
  config.dynamicSmemBytes = params.rows_per_tile * stride * sizeof(float);
  config.stream = stream;
  if (config.dynamicSmemBytes > kFreeShared - sizeof(float) * kDenseRows * kDenseColumns) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(config.dynamicSmemBytes));
    if (error != cudaSuccess) return error;
  }
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace
}  // namespace moe_comp

cudaError_t moe_comp_hadamard_hash(const moe_comp::HashCall* call, cudaStream_t stream) {
  using namespace moe_comp;
  if (call->columns < 1) return cudaErrorInvalidValue;
  const int64_t rotations = (call->num_coordinates + call->columns - 1) / call->columns;
  auto* kernel = call->row_type == RowType::kFloat32    ? hadamard_hash_kernel<Float32>
                 : call->row_type == RowType::kBfloat16 ? hadamard_hash_kernel<Bfloat16>
                                                        : hadamard_hash_kernel<Float16>;
  return launch(kernel, *call, rotations * call->columns, kTileValues, kThreads, stream);
}

cudaError_t moe_comp_dense_hash(const moe_comp::HashCall* call, cudaStream_t stream) {
  using namespace moe_comp;
  auto* kernel = call->row_type == RowType::kFloat32    ? dense_hash_kernel<Float32>
                 : call->row_type == RowType::kBfloat16 ? dense_hash_kernel<Bfloat16>
                                                        : dense_hash_kernel<Float16>;
  const int64_t threads = (call->num_coordinates + kWarp - 1) / kWarp * kWarp;
  return launch(kernel, *call, call->num_coordinates, kDenseRows, threads, stream);
}
