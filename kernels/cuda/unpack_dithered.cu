// unpack_dithered: packed codes of a message back to float rows, less the random halves that their
// rounding added. The contract is megatron_moe_comp/ops/unpack_dithered.py.
//
// As in unpack_dequantize.cu, but a thread has the eight columns that share a call of Philox.
#include <cfloat>
#include <cstring>

#include "../quantize_math.cuh"
#include "launchers.h"
#include "row_types.cuh"
#include "staging.cuh"
#include "tiles.cuh"

namespace moe_comp {
namespace {

constexpr int kTileValues = 32 * kThreads;
constexpr int kMaxSenders = 64;  // of one launch: with the segments, within 4 KiB of parameters

// Who sent a segment: the key, and the number of its first row there.
struct Sender {
  uint64_t key;
  uint32_t first_row;
};

struct DitheredParams {
  const uint8_t* message;
  void* rows;
  int32_t hidden;
  uint32_t offset;
  uint32_t stream;
  float largest;  // value of the rows' type
  SegmentTableOf<kMaxSenders> table;
  Sender senders[kMaxSenders];
};

// Eight columns of a row.
template <typename Row>
struct Group {
  using Bits = typename Row::Bits;
  static constexpr int kVectors = kGroup * sizeof(Bits) / sizeof(uint4);

  float values[kGroup];

  // Values whose codes begin at bit `bit` of the stage.
  __device__ Group(const uint4* stage, uint32_t bit, const uint32_t* words, float unit,
                   int num_bits, float largest) {
#pragma unroll
    for (int i = 0; i < kGroup; i += 4) {
      const uint32_t codes = get_bits(stage, bit + i * num_bits);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t code = codes >> j * num_bits & ((1u << num_bits) - 1);
        const uint32_t half = words[(i + j) / 2] >> j % 2 * 16 & 0xffff;
        values[i + j] = saturated(dithered_value_of(code, half, unit, num_bits), largest);
      }
    }
  }

  __device__ void store(Bits* target) const {
    constexpr int kPerWord = kGroup / 4 / kVectors;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      decltype(Row::packed(values)) words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = Row::packed(values + (4 * v + i) * kPerWord);
      uint4 vector;
      std::memcpy(&vector, words, sizeof vector);
      // An assignment may become four stores.
      __stwb(reinterpret_cast<uint4*>(target) + v, vector);
    }
  }

  __device__ void store_some(Bits* target, int count) const {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (i < count) target[i] = Row::bits(values[i]);
    }
  }
};

// kTeam threads have a row, or the part of a longer row that is a tile.
template <typename Row, bool kWide, int kTeam>
__global__ void __launch_bounds__(kThreads)
    unpack_dithered_kernel(const __grid_constant__ DitheredParams p) {
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
  const Sender& sender = p.senders[tile.segment];

  copy_in(codes, codes_source, tile.num_rows * row_bytes);
  copy_in(scales, scales_source, tile.num_rows * 4);
  __syncthreads();

  for (int row = team; row < tile.num_rows; row += kTeams) {
    const uint32_t scale = get_bits(scales, 8 * (stage_offset(scales_source) + 4 * row));
    const float unit = dithered_unit_of(bits_float(scale), tile.num_bits);
    const uint32_t number = sender.first_row + static_cast<uint32_t>(tile.segment_row + row);
    const uint32_t first_bit = 8 * (stage_offset(codes_source) + row * row_bytes);
    auto* target = static_cast<typename Row::Bits*>(p.rows) +
                   (tile.first_row + row) * p.hidden + tile.first_column;
    for (int i = lane * kGroup; i < num_columns; i += kTeam * kGroup) {
      uint32_t words[4];
      philox4x32(static_cast<uint32_t>((tile.first_column + i) / kGroup), number, p.offset,
                 p.stream, sender.key, words);
      const Group<Row> group(codes, first_bit + i * tile.num_bits, words, unit, tile.num_bits,
                             p.largest);
      if constexpr (kWide) {
        group.store(target + i);
      } else {
        group.store_some(target + i, num_columns - i);
      }
    }
  }
}

template <typename Row, bool kWide>
cudaError_t launch_rows(const OpCall& call, const int64_t* senders, DitheredParams& params,
                        cudaStream_t stream) {
  const bool has_few_columns = call.hidden <= kTileValues / (kThreads / kWarp);
  auto* kernel = has_few_columns ? unpack_dithered_kernel<Row, kWide, kWarp>
                                 : unpack_dithered_kernel<Row, kWide, kThreads>;
  const int teams = has_few_columns ? kThreads / kWarp : 1;
  params.table.rows_per_tile = rows_per_tile(call.hidden, kTileValues, teams);
  params.table.tiles_per_row = static_cast<int32_t>((call.hidden + kTileValues - 1) / kTileValues);
  params.table.columns_per_tile = kTileValues;
  return launch_tiles(kernel, params, call, stream, [&](int64_t number, int32_t place) {
    params.senders[place] = {static_cast<uint64_t>(senders[2 * number + 1]),
                             static_cast<uint32_t>(senders[2 * number])};
  });
}

template <typename Row>
cudaError_t launch_rows(const OpCall& call, const int64_t* senders, DitheredParams& params,
                        float largest, cudaStream_t stream) {
  params.largest = largest;
  return has_wide_rows(call) ? launch_rows<Row, true>(call, senders, params, stream)
                             : launch_rows<Row, false>(call, senders, params, stream);
}

}  // namespace
}  // namespace moe_comp

cudaError_t moe_comp_unpack_dithered(const moe_comp::OpCall* call, const int64_t* senders,
                                     uint32_t offset, uint32_t random_stream,
                                     cudaStream_t stream) {
  using namespace moe_comp;
  if (call->hidden < 0 || call->hidden > kMaxHidden) return cudaErrorInvalidValue;
  DitheredParams params = {};
  params.message = call->message;
  params.rows = call->rows;
  params.hidden = static_cast<int32_t>(call->hidden);
  params.offset = offset;
  params.stream = random_stream;
  switch (call->row_type) {
    case RowType::kFloat32:
      return launch_rows<Float32>(*call, senders, params, FLT_MAX, stream);
    case RowType::kBfloat16:
      return launch_rows<Bfloat16>(*call, senders, params, 0x1.fep127f, stream);
    case RowType::kFloat16:
      return launch_rows<Float16>(*call, senders, params, 65504.0f, stream);
    case RowType::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}
