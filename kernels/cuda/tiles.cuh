// Which rows a block of threads works on. A segment is divided into tiles, one for each block; the
// segments are a kernel parameter, so that a call neither copies to the device nor waits for it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../quantize_math.cuh"
#include "launchers.h"

namespace moe_comp {

constexpr int kWarp = 32;
constexpr int kThreads = 256;  // in a block
constexpr int kGroup = 8;      // columns that share a call of Philox; their codes fill b bytes
constexpr int kMaxTileRows = 64;
constexpr int kMaxSegments = 96;  // of one launch: a kernel has 4 KiB of parameters

struct Segment {
  int64_t first_row;
  int64_t num_rows;
  int64_t codes_offset;
  int64_t scales_offset;
  int32_t num_bits;
  uint32_t first_tile;  // tiles of the segments before this one
};

template <int kCapacity>
struct SegmentTableOf {
  int32_t num_segments;
  int32_t rows_per_tile;
  int32_t tiles_per_row;     // more than one only where rows_per_tile is one
  int32_t columns_per_tile;  // a multiple of kGroup
  Segment segments[kCapacity];
};

using SegmentTable = SegmentTableOf<kMaxSegments>;

// Rows (or a part of one row) of one segment, whose codes lie one after the other in the message.
struct Tile {
  int64_t first_row;
  int64_t codes_offset;
  int64_t scales_offset;
  int num_rows;
  int num_bits;
  int first_column;
  int segment;          // in the table of the launch
  int64_t segment_row;  // rows of the segment before those of the tile
};

template <int kCapacity>
__device__ inline Tile find_tile(const SegmentTableOf<kCapacity>& table, uint32_t index,
                                 int hidden) {
  // The last segment that does not begin behind the tile.
  int low = 0, high = table.num_segments - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.segments[middle].first_tile <= index) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const Segment& segment = table.segments[low];
  const uint32_t local = index - segment.first_tile;
  const int64_t row = int64_t{local / table.tiles_per_row} * table.rows_per_tile;
  const int64_t left = segment.num_rows - row;
  Tile tile;
  tile.num_bits = segment.num_bits;
  tile.num_rows = left < table.rows_per_tile ? static_cast<int>(left) : table.rows_per_tile;
  tile.first_column = static_cast<int>(local % table.tiles_per_row) * table.columns_per_tile;
  tile.first_row = segment.first_row + row;
  tile.segment = low;
  tile.segment_row = row;
  tile.codes_offset = segment.codes_offset + row * packed_bytes(hidden, tile.num_bits) +
                      packed_bytes(tile.first_column, tile.num_bits);
  tile.scales_offset = segment.scales_offset + row * static_cast<int64_t>(sizeof(float));
  return tile;
}

// As many rows as have `num_values` values, and as suit `teams` of threads with a row each.
inline int rows_per_tile(int64_t hidden, int num_values, int teams) {
  int64_t rows = num_values / (hidden < 1 ? 1 : hidden);
  rows = rows < 1 ? 1 : rows > kMaxTileRows ? kMaxTileRows : rows;
  return static_cast<int>(rows > teams ? rows - rows % teams : rows);
}

struct NothingMore {
  void operator()(int64_t /*number*/, int32_t /*place*/) const {}
};

// Launches a kernel for all segments, as often as its params.table gets full. Segments without rows
// are left out. `set(number, place)` is called for each one of the call and its place in the table.
template <typename Params, typename Set = NothingMore>
cudaError_t launch_tiles(void (*kernel)(Params), Params& params, const OpCall& call,
                         cudaStream_t stream, const Set& set = {}) {
  auto& table = params.table;
  constexpr int kCapacity = sizeof table.segments / sizeof(Segment);
  int64_t tiles = 0;
  table.num_segments = 0;
  for (int64_t i = 0; i < call.num_segments; ++i) {
    const int64_t* fields = call.segments + i * kSegmentFields;
    if (fields[1] > 0) {
      set(i, table.num_segments);
      Segment& segment = table.segments[table.num_segments++];
      segment.first_row = fields[0];
      segment.num_rows = fields[1];
      segment.num_bits = static_cast<int32_t>(fields[2]);
      segment.codes_offset = fields[3];
      segment.scales_offset = fields[4];
      segment.first_tile = static_cast<uint32_t>(tiles);
      tiles += (fields[1] + table.rows_per_tile - 1) / table.rows_per_tile * table.tiles_per_row;
    }
    if (table.num_segments == kCapacity || (i == call.num_segments - 1 && tiles > 0)) {
      if (tiles > INT32_MAX) return cudaErrorInvalidConfiguration;
      cudaLaunchConfig_t config = {};
      config.gridDim = dim3(static_cast<uint32_t>(tiles));
      config.blockDim = dim3(kThreads);
      config.stream = stream;
      const cudaError_t error = cudaLaunchKernelEx(&config, kernel, params);
      if (error != cudaSuccess) return error;
      table.num_segments = 0;
      tiles = 0;
    }
  }
  return cudaSuccess;
}

// Whether rows can be read and written 16 bytes at a time.
inline bool has_wide_rows(const OpCall& call) {
  return call.hidden % kGroup == 0 && reinterpret_cast<uintptr_t>(call.rows) % sizeof(uint4) == 0;
}

}  // namespace moe_comp
