// An op's segments: checked once, then walked row by row on all threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "../segment_checks.h"

namespace moe_comp {

// Values that are worth another thread.
constexpr int64_t kGrainValues = 32768;

// Rows of one width whose codes lie one after the other in a message; see ops/segments.py.
struct Segment {
  int64_t first_row;
  int64_t num_rows;
  int num_bits;
  int64_t codes_offset;
  int64_t scales_offset;
  size_t number;  // in the table
};

// Returns the segments with rows of an op's table.
std::vector<Segment> segments_of(at::IntArrayRef table);

// The same. Throws a ValueError that names the value and the requirement unless all tensors have the
// right form and every segment lies inside of them.
std::vector<Segment> checked_segments(at::IntArrayRef table, const at::Tensor& rows,
                                      const std::optional<at::Tensor>& row_scales,
                                      const at::Tensor& message, SegmentForm form = {});

// Calls `visit(segment, i)` for every row i of every segment. Rows are divided among the threads
// without regard to segments, which may be very unequal.
template <typename Visit>
void for_each_row(const std::vector<Segment>& segments, int64_t hidden, const Visit& visit) {
  int64_t total = 0;
  for (const Segment& segment : segments) total += segment.num_rows;
  const int64_t grain = std::max<int64_t>(1, kGrainValues / std::max<int64_t>(1, hidden));
  at::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
    int64_t rows_before = 0;
    for (const Segment& segment : segments) {
      const int64_t last = std::min(end - rows_before, segment.num_rows);
      for (int64_t i = std::max<int64_t>(0, begin - rows_before); i < last; ++i) visit(segment, i);
      rows_before += segment.num_rows;
    }
    // Stores that bypass the caches are ordered by a fence alone.
    std::atomic_thread_fence(std::memory_order_seq_cst);
  });
}

}  // namespace moe_comp
