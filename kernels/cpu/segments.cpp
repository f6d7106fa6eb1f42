#include "segments.h"

namespace moe_comp {

std::vector<Segment> segments_of(at::IntArrayRef table) {
  std::vector<Segment> segments;
  for (size_t i = 0; i < table.size(); i += kSegmentFields) {
    if (table[i + 1] == 0) continue;
    segments.push_back({table[i], table[i + 1], static_cast<int>(table[i + 2]), table[i + 3],
                        table[i + 4], i / kSegmentFields});
  }
  return segments;
}

std::vector<Segment> checked_segments(at::IntArrayRef table, const at::Tensor& rows,
                                      const std::optional<at::Tensor>& row_scales,
                                      const at::Tensor& message, SegmentForm form) {
  check_arguments(table, rows, row_scales, message, form);
  return segments_of(table);
}

}  // namespace moe_comp
