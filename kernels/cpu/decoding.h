// What the ops that decode share: how their rows are written.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <limits>
#include <vector>

#include "row_types.h"
#include "segments.h"

namespace moe_comp {

// From this many bytes of rows on, which no cache keeps until they are read, stores that bypass the
// caches were measured to be faster.
constexpr int64_t kStreamingBytes = 48 << 20;

// Whether stores may bypass the caches; then rows are multiples of 64 bytes at such addresses.
inline bool is_streaming(const std::vector<Segment>& segments, const void* rows,
                         int64_t row_bytes) {
  int64_t total_bytes = 0;
  for (const Segment& segment : segments) total_bytes += segment.num_rows * row_bytes;
  return total_bytes >= kStreamingBytes && row_bytes % 64 == 0 &&
         reinterpret_cast<uintptr_t>(rows) % 64 == 0;
}

// The largest value of a type of rows that a float32 holds; see `saturated`.
inline float largest_of(at::ScalarType type) {
  if (type == at::kHalf) return 65504.0f;
  return type == at::kBFloat16 ? 0x1.fep127f : std::numeric_limits<float>::max();
}

// Calls `write` with a pointer to the rows as float or Bf16; rows of other types get what it wrote
// as float.
template <typename Write>
void write_rows(const at::Tensor& rows, const std::vector<Segment>& segments, const Write& write) {
  if (rows.scalar_type() == at::kFloat) {
    write(rows.mutable_data_ptr<float>());
  } else if (rows.scalar_type() == at::kBFloat16) {
    write(static_cast<Bf16*>(rows.mutable_data_ptr()));
  } else {
    const at::Tensor float_rows = at::empty(rows.sizes(), rows.options().dtype(at::kFloat));
    write(float_rows.mutable_data_ptr<float>());
    for (const Segment& segment : segments) {
      rows.narrow(0, segment.first_row, segment.num_rows)
          .copy_(float_rows.narrow(0, segment.first_row, segment.num_rows));
    }
  }
}

}  // namespace moe_comp
