// gaussian_pack and gaussian_unpack: rows as the levels nearest to them, and back. The contract is
// megatron_moe_comp/ops/gaussian.py.
//
// To pack, a warp has a row: its lanes are those that squares are added in. It reads the row twice,
// the second time from a cache, and writes the bytes of each group of columns where they belong.
// To unpack, a block copies the bytes of its tile into shared memory and threads write 16 bytes.
#include <cfloat>
#include <cstring>

#include "../gaussian_math.cuh"
#include "launchers.h"
#include "row_types.cuh"
#include "staging.cuh"
#include "tiles.cuh"

namespace moe_comp {
namespace {

constexpr int kTileValues = 32 * kThreads;
constexpr int kWarps = kThreads / kWarp;
static_assert(kWarp == kSumLanes);

struct GaussianParams {
  uint8_t* message;
  void* rows;
  int32_t hidden;
  float largest;             // value of the rows' type
  GaussianLevels levels[3];  // of 2, 3 and 4 bits
  SegmentTable table;
};

// Where the scale of a row of a tile is.
__device__ uint8_t* scale_of_row(const GaussianParams& p, const Tile& tile, int row) {
  const int64_t offset = p.table.segments[tile.segment].scales_offset;
  return p.message + offset + (tile.segment_row + row) * kGaussianScaleBytes;
}

template <typename Row>
__device__ float value_at(const typename Row::Bits* values, int column) {
  const uint32_t word = values[column];
  return Row::value(&word, 0);
}

// The sum of the squares of a row, in all lanes of a warp.
template <typename Row>
__device__ double sum_of_squares(const typename Row::Bits* values, int hidden) {
  double sum = 0.0;
  for (int first = 0; first < hidden; first += kSumColumns) {
    const int last = hidden - first < kSumColumns ? hidden : first + kSumColumns;
    double lane_sum = 0.0;
#pragma unroll 4
    for (int i = first + static_cast<int>(threadIdx.x % kWarp); i < last; i += kWarp) {
      lane_sum = add_square(lane_sum, value_at<Row>(values, i));
    }
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      lane_sum = add_sums(lane_sum, __shfl_xor_sync(0xffffffffu, lane_sum, offset));
    }
    sum = add_sums(sum, lane_sum);
  }
  return sum;
}

// Eight columns of a row; those behind the last one are zeros.
template <typename Row, bool kWide>
__device__ void load_group(const typename Row::Bits* values, int columns, float (&group)[kGroup]) {
  constexpr int kPerWord = sizeof(uint32_t) / sizeof(typename Row::Bits);
  constexpr int kWords = kGroup / kPerWord;
  if constexpr (kWide) {
    uint32_t words[kWords];
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      const uint4 vector = __ldg(reinterpret_cast<const uint4*>(values) + i);
      words[4 * i] = vector.x;
      words[4 * i + 1] = vector.y;
      words[4 * i + 2] = vector.z;
      words[4 * i + 3] = vector.w;
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) group[i] = Row::value(words, i);
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) group[i] = i < columns ? value_at<Row>(values, i) : 0.0f;
  }
}

template <typename Row, bool kWide>
__global__ void __launch_bounds__(kThreads)
    gaussian_pack_kernel(const __grid_constant__ GaussianParams p) {
  const int row = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const Tile tile = find_tile(p.table, blockIdx.x, p.hidden);
  if (row >= tile.num_rows) return;
  const auto* values =
      static_cast<const typename Row::Bits*>(p.rows) + (tile.first_row + row) * p.hidden;
  const uint16_t bits =
      p.hidden == 0 ? 0 : rms_bits(sum_of_squares<Row>(values, p.hidden), p.hidden);
  if (lane < kGaussianScaleBytes) {
    scale_of_row(p, tile, row)[lane] = static_cast<uint8_t>(bits >> 8 * lane);
  }
  const float scale = scale_of_bits(bits);
  const bool is_usable_row = scale > 0.0f;
  const float per_unit = is_usable_row ? cells_per_unit(scale) : 0.0f;
  const int num_bits = tile.num_bits, half = 1 << (num_bits - 1);
  const GaussianLevels& levels = p.levels[num_bits - 2];
  uint8_t* target = p.message + tile.codes_offset + row * packed_bytes(p.hidden, num_bits);
  for (int i = lane * kGroup; i < p.hidden; i += kWarp * kGroup) {
    const int columns = p.hidden - i < kGroup ? p.hidden - i : kGroup;
    float group[kGroup];
    load_group<Row, kWide>(values + i, columns, group);
    uint32_t codes = 0;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const int cell = is_usable_row ? cell_of(group[j], per_unit) : 0;
      const int mirrored = cell < 0 ? ~cell : cell;
      int index = 0;
#pragma unroll
      for (int t = 0; t < kMaxLevels / 2 - 1; ++t) {
        index += t < half - 1 && mirrored >= levels.thresholds[t];
      }
      const int code = cell < 0 ? half - 1 - index : half + index;
      if (j < columns) codes |= static_cast<uint32_t>(code) << j * num_bits;
    }
    const int num_bytes = static_cast<int>(packed_bytes(columns, num_bits));
#pragma unroll
    for (int j = 0; j < kMaxGaussianBits; ++j) {
      if (j < num_bytes) target[i / kGroup * num_bits + j] = static_cast<uint8_t>(codes >> 8 * j);
    }
  }
}

// 16 bytes of a row.
template <typename Row>
struct Values {
  using Bits = typename Row::Bits;
  static constexpr int kSize = sizeof(uint4) / sizeof(Bits);

  float values[kSize];

  // Values whose codes begin at bit `bit` of the stage.
  __device__ Values(const uint4* stage, uint32_t bit, const float* levels, float scale,
                    float largest, int num_bits) {
    const uint32_t codes = get_bits(stage, bit);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const uint32_t code = codes >> i * num_bits & ((1u << num_bits) - 1);
      values[i] = saturated(mul_rn(levels[code], scale), largest);
    }
  }

  __device__ void store(Bits* target) const {
    decltype(Row::packed(values)) words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = Row::packed(values + i * kSize / 4);
    uint4 vector;
    std::memcpy(&vector, words, sizeof vector);
    // An assignment may become four stores.
    __stwb(reinterpret_cast<uint4*>(target), vector);
  }

  __device__ void store_some(Bits* target, int count) const {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (i < count) target[i] = Row::bits(values[i]);
    }
  }
};

// kTeam threads have a row, or the part of a longer row that is a tile.
template <typename Row, bool kWide, int kTeam>
__global__ void __launch_bounds__(kThreads)
    gaussian_unpack_kernel(const __grid_constant__ GaussianParams p) {
  __shared__ Stage<kTileValues / 2> codes;  // of four bits at most
  __shared__ float levels[kMaxLevels];

  const int team = threadIdx.x / kTeam, lane = threadIdx.x % kTeam;
  const Tile tile = find_tile(p.table, blockIdx.x, p.hidden);
  const int left = p.hidden - tile.first_column;
  const int num_columns = left < p.table.columns_per_tile ? left : p.table.columns_per_tile;
  const int row_bytes = static_cast<int>(packed_bytes(num_columns, tile.num_bits));
  const int half = 1 << (tile.num_bits - 1), thread = threadIdx.x;
  const uint8_t* codes_source = p.message + tile.codes_offset;

  copy_in(codes, codes_source, tile.num_rows * row_bytes);
  if (thread < half) {
    const float magnitude = p.levels[tile.num_bits - 2].magnitudes[thread];
    levels[half + thread] = magnitude;
    levels[half - 1 - thread] = -magnitude;
  }
  __syncthreads();

  for (int row = team; row < tile.num_rows; row += kThreads / kTeam) {
    const uint8_t* source = scale_of_row(p, tile, row);
    const float scale = scale_of_bits(static_cast<uint16_t>(source[0] | source[1] << 8));
    const uint32_t first_bit = 8 * (stage_offset(codes_source) + row * row_bytes);
    auto* target = static_cast<typename Row::Bits*>(p.rows) +
                   (tile.first_row + row) * p.hidden + tile.first_column;
    for (int i = lane * Values<Row>::kSize; i < num_columns; i += kTeam * Values<Row>::kSize) {
      const Values<Row> values(codes, first_bit + i * tile.num_bits, levels, scale, p.largest,
                               tile.num_bits);
      if constexpr (kWide) {
        values.store(target + i);
      } else {
        values.store_some(target + i, num_columns - i);
      }
    }
  }
}

template <typename Row, bool kWide>
cudaError_t launch_pack(const OpCall& call, GaussianParams& params, cudaStream_t stream) {
  params.table.rows_per_tile = kWarps;
  params.table.tiles_per_row = 1;
  return launch_tiles(gaussian_pack_kernel<Row, kWide>, params, call, stream);
}

template <typename Row, bool kWide>
cudaError_t launch_unpack(const OpCall& call, GaussianParams& params, cudaStream_t stream) {
  const bool has_few_columns = call.hidden <= kTileValues / kWarps;
  auto* kernel = has_few_columns ? gaussian_unpack_kernel<Row, kWide, kWarp>
                                 : gaussian_unpack_kernel<Row, kWide, kThreads>;
  const int teams = has_few_columns ? kWarps : 1;
  params.table.rows_per_tile = rows_per_tile(call.hidden, kTileValues, teams);
  params.table.tiles_per_row = static_cast<int32_t>((call.hidden + kTileValues - 1) / kTileValues);
  params.table.columns_per_tile = kTileValues;
  return launch_tiles(kernel, params, call, stream);
}

template <typename Row>
cudaError_t launch_rows(const OpCall& call, bool packs, float largest, cudaStream_t stream) {
  GaussianParams params = {};
  params.message = call.message;
  params.rows = call.rows;
  params.hidden = static_cast<int32_t>(call.hidden);
  params.largest = largest;
  for (int i = 0; i < 3; ++i) params.levels[i] = kGaussianLevels[i];
  if (packs) {
    return has_wide_rows(call) ? launch_pack<Row, true>(call, params, stream)
                               : launch_pack<Row, false>(call, params, stream);
  }
  return has_wide_rows(call) ? launch_unpack<Row, true>(call, params, stream)
                             : launch_unpack<Row, false>(call, params, stream);
}

cudaError_t launch(const OpCall& call, bool packs, cudaStream_t stream) {
  if (call.hidden < 0 || call.hidden > kMaxHidden) return cudaErrorInvalidValue;
  switch (call.row_type) {
    case RowType::kFloat32:
      return launch_rows<Float32>(call, packs, FLT_MAX, stream);
    case RowType::kBfloat16:
      return launch_rows<Bfloat16>(call, packs, 0x1.fep127f, stream);
    case RowType::kFloat16:
      return launch_rows<Float16>(call, packs, 65504.0f, stream);
    case RowType::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace moe_comp

cudaError_t moe_comp_gaussian_pack(const moe_comp::OpCall* call, cudaStream_t stream) {
  return moe_comp::launch(*call, true, stream);
}

cudaError_t moe_comp_gaussian_unpack(const moe_comp::OpCall* call, cudaStream_t stream) {
  return moe_comp::launch(*call, false, stream);
}
