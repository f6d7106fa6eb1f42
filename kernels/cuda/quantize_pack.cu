// quantize_pack: float rows to densely packed, randomly rounded codes in a message. The contract is
// megatron_moe_comp/ops/quantize_pack.py.
//
// A team of threads (a warp or the whole block) has a row at a time. Looking for the largest
// magnitude it keeps the row in shared memory; then it quantizes groups of eight columns and puts
// their codes into shared memory too, from where the block writes the bytes of its tile.
#include "../quantize_math.cuh"
#include "launchers.h"
#include "row_types.cuh"
#include "staging.cuh"
#include "tiles.cuh"

namespace moe_comp {
namespace {

constexpr int kPartColumns = 32 * kThreads;  // of a row or a tile, whose codes are staged at once

struct QuantizeParams {
  const void* rows;
  const float* row_scales;
  uint8_t* message;
  RandomStream random;
  int32_t hidden;
  bool mid_rise;
  SegmentTable table;
};

// Eight columns of a row; those behind the last one are zeros.
template <typename Row>
struct Group {
  static constexpr int kVectors = kGroup * sizeof(typename Row::Bits) / sizeof(uint4);

  uint32_t words[4 * kVectors];

  __device__ uint4 vector(int i) const {
    return make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
  }

  __device__ void set_vector(int i, uint4 vector) {
    words[4 * i] = vector.x;
    words[4 * i + 1] = vector.y;
    words[4 * i + 2] = vector.z;
    words[4 * i + 3] = vector.w;
  }
};

template <typename Row, bool kWide>
__device__ Group<Row> load_group(const typename Row::Bits* row, int index, int hidden) {
  Group<Row> group;
  const typename Row::Bits* values = row + index * kGroup;
  if constexpr (kWide) {
#pragma unroll
    for (int i = 0; i < Group<Row>::kVectors; ++i) {
      group.set_vector(i, __ldg(reinterpret_cast<const uint4*>(values) + i));
    }
  } else {
    constexpr int kPerWord = sizeof(uint32_t) / sizeof(typename Row::Bits);
    const int columns = hidden - index * kGroup;
#pragma unroll
    for (int i = 0; i < kGroup; i += kPerWord) {
      uint32_t& word = group.words[i / kPerWord];
      word = i < columns ? values[i] : 0;
      if (kPerWord == 2 && i + 1 < columns) word |= static_cast<uint32_t>(values[i + 1]) << 16;
    }
  }
  return group;
}

// Reads a row and keeps its first groups. Returns the largest magnitude that this thread saw.
template <typename Row, bool kWide, int kTeam, int kKeptGroups, bool kLong>
__device__ uint32_t keep_row(const typename Row::Bits* values, int hidden,
                             uint4 (*kept)[kKeptGroups]) {
  const int num_groups = (hidden + kGroup - 1) / kGroup;
  uint32_t largest = 0;
#pragma unroll 4
  for (int i = threadIdx.x % kTeam; i < num_groups; i += kTeam) {
    const Group<Row> group = load_group<Row, kWide>(values, i, hidden);
#pragma unroll
    for (const uint32_t word : group.words) largest = Row::absmax(largest, word);
    if (kLong && i >= kKeptGroups) continue;
#pragma unroll
    for (int j = 0; j < Group<Row>::kVectors; ++j) kept[j][i] = group.vector(j);
  }
  return largest;
}

template <typename Row, int kKeptGroups>
__device__ Group<Row> kept_group(const uint4 (*kept)[kKeptGroups], int index) {
  Group<Row> group;
#pragma unroll
  for (int j = 0; j < Group<Row>::kVectors; ++j) group.set_vector(j, kept[j][index]);
  return group;
}

// The largest value of a team. `warps` are shared memory that no thread may still be reading.
template <int kTeam>
__device__ uint32_t team_max(uint32_t value, uint32_t* warps) {
  value = __reduce_max_sync(0xffffffffu, value);
  if constexpr (kTeam > kWarp) {
    if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kThreads / kWarp; ++i) value = larger(value, warps[i]);
  }
  return value;
}

// How the values of one row become codes. All codes of a row without a usable scale are L.
struct RowQuantizer {
  uint32_t row;
  int num_bits;
  uint32_t mask;
  float inverse;
  float top;

  __device__ RowQuantizer(uint32_t row_number, float scale, int bits, bool mid_rise)
      : row(row_number),
        num_bits(bits),
        mask(is_usable(scale) ? 0xffffffffu : 0),
        inverse(is_usable(scale) ? inverse_of(scale, top_of(bits, mid_rise)) : 0.0f),
        top(top_of(bits, mid_rise && is_usable(scale))) {}

  // The codes of a group as a little-endian stream of bits. Codes do not overlap, so adding puts
  // them side by side.
  template <typename Row>
  __device__ uint64_t codes(Group<Row> group, int index, const RandomStream& random) const {
#pragma unroll
    for (uint32_t& word : group.words) word &= mask;
    uint32_t words[4], pairs[4];
    philox4x32(index, row, random.offset, random.stream, random.key, words);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float even = Row::value(group.words, 2 * i), odd = Row::value(group.words, 2 * i + 1);
      pairs[i] = code_of(even, inverse, top, words[i] & 0xffff) +
                 (code_of(odd, inverse, top, words[i] >> 16) << num_bits);
    }
    const uint32_t low = pairs[0] + (pairs[1] << 2 * num_bits);
    const uint32_t high = pairs[2] + (pairs[3] << 2 * num_bits);
    return low + (uint64_t{high} << 4 * num_bits);
  }
};

// kTeam threads have a row. They read it once, unless it is longer than kKeptGroups. A row longer
// than kPartGroups is a tile of its own and written in parts.
template <typename Row, bool kWide, int kTeam, bool kLong>
__global__ void __launch_bounds__(kThreads)
    quantize_pack_kernel(const __grid_constant__ QuantizeParams p) {
  constexpr int kTeams = kThreads / kTeam;
  constexpr int kPartGroups = kPartColumns / kGroup;
  // 32 KiB at most: with the codes, what a block may have without asking.
  constexpr int kKeptGroups = (kLong ? 2 / Group<Row>::kVectors : 1) * kPartGroups / kTeams;
  __shared__ uint4 kept[kTeams][Group<Row>::kVectors][kKeptGroups];
  __shared__ Stage<kPartColumns> codes;
  __shared__ Stage<kMaxTileRows * sizeof(float)> scales;
  __shared__ uint32_t warps[2][kThreads / kWarp];

  const int team = threadIdx.x / kTeam, lane = threadIdx.x % kTeam;
  const int num_groups = (p.hidden + kGroup - 1) / kGroup;
  const Tile tile = find_tile(p.table, blockIdx.x, p.hidden);
  const int row_bytes = static_cast<int>(packed_bytes(p.hidden, tile.num_bits));
  uint8_t* codes_target = p.message + tile.codes_offset;
  uint8_t* scales_target = p.message + tile.scales_offset;

  int first = 0;       // group of the part
  float scale = 0.0f;  // stays that of a row in parts
  do {
    const int last = kLong && num_groups - first > kPartGroups ? first + kPartGroups : num_groups;
    uint8_t* part_target = codes_target + first * tile.num_bits;
    for (int row = team; row < tile.num_rows; row += kTeams) {
      const int64_t row_number = tile.first_row + row;
      const auto* values = static_cast<const typename Row::Bits*>(p.rows) + row_number * p.hidden;
      if (first == 0) {
        uint32_t largest =
            keep_row<Row, kWide, kTeam, kKeptGroups, kLong>(values, p.hidden, kept[team]);
        if (p.row_scales) {
          scale = p.row_scales[row_number];
        } else {
          // Other warps may still read the results of the row before this one.
          largest = team_max<kTeam>(largest, warps[row % 2]);
          scale = scale_from_absmax_bits(Row::float32_bits(largest));
          const int offset = stage_offset(scales_target) + 4 * row;
          if (lane == 0) put_bytes(scales, offset, float_bits(scale), 4);
        }
      }
      const RowQuantizer quantizer(static_cast<uint32_t>(row_number), scale, tile.num_bits,
                                   p.mid_rise);
      const int offset = stage_offset(part_target) + row * row_bytes - first * tile.num_bits;
      for (int i = first + lane; i < last; i += kTeam) {
        const bool is_kept = !kLong || i < kKeptGroups;
        const Group<Row> group = is_kept ? kept_group<Row>(kept[team], i)
                                         : load_group<Row, kWide>(values, i, p.hidden);
        uint64_t bytes = quantizer.codes(group, i, p.random);
        int num_bytes = tile.num_bits;
        const int columns = p.hidden - i * kGroup;
        if (!kWide && columns < kGroup) {
          bytes &= (uint64_t{1} << columns * tile.num_bits) - 1;
          num_bytes = static_cast<int>(packed_bytes(columns, tile.num_bits));
        }
        put_bytes(codes, offset + i * tile.num_bits, bytes, num_bytes);
      }
    }
    __syncthreads();
    copy_out(part_target, codes,
             last < num_groups ? kPartGroups * tile.num_bits
                               : tile.num_rows * row_bytes - first * tile.num_bits);
    first = last;
    if (first < num_groups) __syncthreads();
  } while (first < num_groups);
  if (!p.row_scales) copy_out(scales_target, scales, tile.num_rows * 4);
}

template <typename Row, bool kWide>
cudaError_t launch_rows(const OpCall& call, QuantizeParams& params, cudaStream_t stream) {
  const bool has_few_columns = call.hidden <= kPartColumns / (kThreads / kWarp);
  auto* kernel = has_few_columns               ? quantize_pack_kernel<Row, kWide, kWarp, false>
                 : call.hidden <= kPartColumns ? quantize_pack_kernel<Row, kWide, kThreads, false>
                                               : quantize_pack_kernel<Row, kWide, kThreads, true>;
  const int teams = has_few_columns ? kThreads / kWarp : 1;
  params.table.rows_per_tile = rows_per_tile(call.hidden, kPartColumns, teams);
  params.table.tiles_per_row = 1;
  return launch_tiles(kernel, params, call, stream);
}

template <typename Row>
cudaError_t launch_rows(const OpCall& call, QuantizeParams& params, cudaStream_t stream) {
  return has_wide_rows(call) ? launch_rows<Row, true>(call, params, stream)
                             : launch_rows<Row, false>(call, params, stream);
}

}  // namespace
}  // namespace moe_comp

cudaError_t moe_comp_quantize_pack(const moe_comp::OpCall* call,
                                   const moe_comp::RandomStream* random, bool mid_rise,
                                   cudaStream_t stream) {
  using namespace moe_comp;
  if (call->hidden < 0 || call->hidden > kMaxHidden) return cudaErrorInvalidValue;
  QuantizeParams params = {};
  params.rows = call->rows;
  params.row_scales = call->row_scales;
  params.message = call->message;
  params.random = *random;
  params.hidden = static_cast<int32_t>(call->hidden);
  params.mid_rise = mid_rise;
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
