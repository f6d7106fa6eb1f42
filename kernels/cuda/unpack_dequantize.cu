// unpack_dequantize: packed codes of a message back to float rows. The contract is
// megatron_moe_comp/ops/unpack_dequantize.py.
//
// A block copies the bytes of its tile into shared memory; then a team of threads (a warp or the
// whole block) has a row at a time, and each thread writes 16 bytes of it.
#include <cstring>

#include "../quantize_math.cuh"
#include "launchers.h"
#include "row_types.cuh"
#include "staging.cuh"
#include "tiles.cuh"

namespace moe_comp {
namespace {

constexpr int kTileValues = 32 * kThreads;

struct DequantizeParams {
  const uint8_t* message;
  const float* row_scales;
  void* rows;
  int32_t hidden;
  SegmentTable table;
};

// 16 bytes of a row.
template <typename Row>
struct Values {
  using Bits = typename Row::Bits;
  static constexpr int kSize = sizeof(uint4) / sizeof(Bits);

  float values[kSize];

  // Values whose codes begin at bit `bit` of the stage.
  __device__ Values(const uint4* stage, uint32_t bit, float step, int num_bits) {
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      const uint32_t codes = get_bits(stage, bit + i * num_bits);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t code = codes >> j * num_bits & ((1u << num_bits) - 1);
        values[i + j] = value_of(code, step, num_bits);
      }
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
    unpack_dequantize_kernel(const __grid_constant__ DequantizeParams p) {
  constexpr int kTeams = kThreads / kTeam;
  __shared__ Stage<kTileValues> codes;
  __shared__ Stage<kMaxTileRows * sizeof(float)> scales;

  const int team = threadIdx.x / kTeam, lane = threadIdx.x % kTeam;
  const Tile tile = find_tile(p.table, blockIdx.x, p.hidden);
  const int left = p.hidden - tile.first_column;
  const int num_columns = left < p.table.columns_per_tile ? left : p.table.columns_per_tile;
  const int row_bytes = static_cast<int>(packed_bytes(num_columns, tile.num_bits));
  const uint8_t* codes_source = p.message + tile.codes_offset;
  const uint8_t* scales_source = p.message + tile.scales_offset;

  copy_in(codes, codes_source, tile.num_rows * row_bytes);
  if (!p.row_scales) copy_in(scales, scales_source, tile.num_rows * 4);
  __syncthreads();

  for (int row = team; row < tile.num_rows; row += kTeams) {
    const int64_t row_number = tile.first_row + row;
    const float scale =
        p.row_scales ? p.row_scales[row_number]
                     : bits_float(get_bits(scales, 8 * (stage_offset(scales_source) + 4 * row)));
    const float step = step_of(scale, tile.num_bits);
    const uint32_t first_bit = 8 * (stage_offset(codes_source) + row * row_bytes);
    auto* target =
        static_cast<typename Row::Bits*>(p.rows) + row_number * p.hidden + tile.first_column;
    for (int i = lane * Values<Row>::kSize; i < num_columns; i += kTeam * Values<Row>::kSize) {
      const Values<Row> values(codes, first_bit + i * tile.num_bits, step, tile.num_bits);
      if constexpr (kWide) {
        values.store(target + i);
      } else {
        values.store_some(target + i, num_columns - i);
      }
    }
  }
}

template <typename Row, bool kWide>
cudaError_t launch_rows(const OpCall& call, DequantizeParams& params, cudaStream_t stream) {
  const bool has_few_columns = call.hidden <= kTileValues / (kThreads / kWarp);
  auto* kernel = has_few_columns ? unpack_dequantize_kernel<Row, kWide, kWarp>
                                 : unpack_dequantize_kernel<Row, kWide, kThreads>;
  const int teams = has_few_columns ? kThreads / kWarp : 1;
  params.table.rows_per_tile = rows_per_tile(call.hidden, kTileValues, teams);
  params.table.tiles_per_row = static_cast<int32_t>((call.hidden + kTileValues - 1) / kTileValues);
  params.table.columns_per_tile = kTileValues;
  return launch_tiles(kernel, params, call, stream);
}

template <typename Row>
cudaError_t launch_rows(const OpCall& call, DequantizeParams& params, cudaStream_t stream) {
  return has_wide_rows(call) ? launch_rows<Row, true>(call, params, stream)
                             : launch_rows<Row, false>(call, params, stream);
}

}  // namespace
}  // namespace moe_comp

cudaError_t moe_comp_unpack_dequantize(const moe_comp::OpCall* call, cudaStream_t stream) {
  using namespace moe_comp;
  if (call->hidden < 0 || call->hidden > kMaxHidden) return cudaErrorInvalidValue;
  DequantizeParams params = {};
  params.message = call->message;
  params.row_scales = call->row_scales;
  params.rows = call->rows;
  params.hidden = static_cast<int32_t>(call->hidden);
  switch (call->row_type) {
    case RowType::kFloat32:
      return launch_rows<Float32>(*call, params, stream);
    case RowType::kBfloat16:
      return launch_rows<Bfloat16>(*call, params, stream);
    case RowType::kFloat16:
      return launch_rows<Float16>(*call, params, stream);
    case RowType::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}
