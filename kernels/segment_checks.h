// What every device checks of an op's arguments before a kernel runs; see ops/segments.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "quantize_math.cuh"

namespace moe_comp {

inline void check_range(int64_t segment, const char* what, int64_t offset, int64_t num_bytes,
                 int64_t message_bytes) {
  TORCH_CHECK_VALUE(0 <= offset && offset <= message_bytes && num_bytes <= message_bytes - offset,
                    "segment ", segment, ": its ", num_bytes, " bytes of ", what, " at offset ",
                    offset, " must lie in the message of ", message_bytes, " bytes");
}

inline void check_tensors(const at::Tensor& rows, const std::optional<at::Tensor>& row_scales,
                   const at::Tensor& message) {
  TORCH_CHECK_VALUE(rows.dim() == 2 && rows.is_contiguous() && rows.is_floating_point(),
                    "rows must be contiguous [N, H] of a floating-point dtype, not ",
                    rows.scalar_type(), " ", rows.sizes(), " with strides ", rows.strides());
  TORCH_CHECK_VALUE(
      message.dim() == 1 && message.is_contiguous() && message.scalar_type() == at::kByte,
      "message must be contiguous uint8 [bytes], not ", message.scalar_type(), " ", message.sizes(),
      " with strides ", message.strides());
  TORCH_CHECK_VALUE(message.device() == rows.device(), "message must be on ", rows.device(),
                    " like rows, not on ", message.device());
  if (!row_scales) return;
  TORCH_CHECK_VALUE(row_scales->dim() == 1 && row_scales->size(0) == rows.size(0) &&
                        row_scales->is_contiguous() && row_scales->scalar_type() == at::kFloat &&
                        row_scales->device() == rows.device(),
                    "row_scales must be contiguous float32 [", rows.size(0), "] on ", rows.device(),
                    ", not ", row_scales->scalar_type(), " ", row_scales->sizes(), " on ",
                    row_scales->device());
}

// Which widths an op has, and the bytes of a row's scale in its messages.
struct SegmentForm {
  int max_bits = kMaxBits;
  int scale_bytes = 4;
};

// Throws a ValueError that names the value and the requirement unless all tensors have the right
// form and every segment lies inside of them.
inline void check_arguments(at::IntArrayRef table, const at::Tensor& rows,
                            const std::optional<at::Tensor>& row_scales, const at::Tensor& message,
                            SegmentForm form = {}) {
  check_tensors(rows, row_scales, message);
  TORCH_CHECK_VALUE(table.size() % kSegmentFields == 0, "segments must hold ", kSegmentFields,
                    " integers per segment, not ", table.size(), " in all");
  for (size_t i = 0; i < table.size(); i += kSegmentFields) {
    const int64_t number = static_cast<int64_t>(i) / kSegmentFields;
    const int64_t first_row = table[i], num_rows = table[i + 1], num_bits = table[i + 2];
    TORCH_CHECK_VALUE(kMinBits <= num_bits && num_bits <= form.max_bits, "segment ", number,
                      ": num_bits must be ", kMinBits, " to ", form.max_bits, ", not ", num_bits);
    TORCH_CHECK_VALUE(0 <= first_row && first_row <= rows.size(0) && 0 <= num_rows &&
                          num_rows <= rows.size(0) - first_row,
                      "segment ", number, ": its ", num_rows, " rows from row ", first_row,
                      " must lie in the ", rows.size(0), " rows");
    if (num_rows == 0) continue;
    const int64_t row_bytes = packed_bytes(rows.size(1), static_cast<int>(num_bits));
    check_range(number, "codes", table[i + 3], num_rows * row_bytes, message.numel());
    if (row_scales) continue;
    check_range(number, "scales", table[i + 4], form.scale_bytes * num_rows, message.numel());
  }
}

inline void check_32_bits(const char* name, int64_t value) {
  TORCH_CHECK_VALUE(0 <= value && value <= UINT32_MAX, name, " must be 0 to 2^32 - 1, not ", value);
}

// `senders`: the number of a segment's first row and a key, for every segment.
inline void check_senders(at::IntArrayRef table, at::IntArrayRef senders) {
  TORCH_CHECK_VALUE(senders.size() % 2 == 0 && senders.size() / 2 == table.size() / kSegmentFields,
                    "senders must hold 2 integers per segment, not ", senders.size(), " in all");
  for (size_t i = 0; i < senders.size() / 2; ++i) {
    const int64_t first_row = senders[2 * i], num_rows = table[i * kSegmentFields + 1];
    TORCH_CHECK_VALUE(0 <= first_row && first_row <= (int64_t{1} << 32) - num_rows, "segment ", i,
                      ": a sender's rows must be 0 to 2^32 - 1, not ", num_rows, " from ",
                      first_row);
  }
}

}  // namespace moe_comp
