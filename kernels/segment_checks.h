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

inline void check_tensors(const at::Tensor& rows, const at::Tensor& message) {
  TORCH_CHECK_VALUE(rows.dim() == 2 && rows.is_contiguous() && rows.is_floating_point(),
                    "rows must be contiguous [N, H] of a floating-point dtype, not ",
                    rows.scalar_type(), " ", rows.sizes(), " with strides ", rows.strides());
  TORCH_CHECK_VALUE(
      message.dim() == 1 && message.is_contiguous() && message.scalar_type() == at::kByte,
      "message must be contiguous uint8 [bytes], not ", message.scalar_type(), " ", message.sizes(),
      " with strides ", message.strides());
  TORCH_CHECK_VALUE(message.device() == rows.device(), "message must be on ", rows.device(),
                    " like rows, not on ", message.device());
}

inline void check_row_scales(const at::Tensor& row_scales, const at::Tensor& rows) {
  TORCH_CHECK_VALUE(row_scales.dim() == 1 && row_scales.size(0) == rows.size(0) &&
                        row_scales.is_contiguous() && row_scales.scalar_type() == at::kFloat &&
                        row_scales.device() == rows.device(),
                    "row_scales must be contiguous float32 [", rows.size(0), "] on ", rows.device(),
                    ", not ", row_scales.scalar_type(), " ", row_scales.sizes(), " on ",
                    row_scales.device());
}

// Throws a ValueError that names the value and the requirement unless the tensors have the right
// form and every segment lies inside of them. The message has `row_scale_bytes` of scales per row.
inline void check_segments(at::IntArrayRef table, const at::Tensor& rows,
                           const at::Tensor& message, int64_t min_bits, int64_t max_bits,
                           int64_t row_scale_bytes) {
  check_tensors(rows, message);
  TORCH_CHECK_VALUE(table.size() % kSegmentFields == 0, "segments must hold ", kSegmentFields,
                    " integers per segment, not ", table.size(), " in all");
  for (size_t i = 0; i < table.size(); i += kSegmentFields) {
    const int64_t number = static_cast<int64_t>(i) / kSegmentFields;
    const int64_t first_row = table[i], num_rows = table[i + 1], num_bits = table[i + 2];
    TORCH_CHECK_VALUE(min_bits <= num_bits && num_bits <= max_bits, "segment ", number,
                      ": num_bits must be ", min_bits, " to ", max_bits, ", not ", num_bits);
    TORCH_CHECK_VALUE(0 <= first_row && first_row <= rows.size(0) && 0 <= num_rows &&
                          num_rows <= rows.size(0) - first_row,
                      "segment ", number, ": its ", num_rows, " rows from row ", first_row,
                      " must lie in the ", rows.size(0), " rows");
    if (num_rows == 0) continue;
    const int64_t row_bytes = packed_bytes(rows.size(1), static_cast<int>(num_bits));
    check_range(number, "codes", table[i + 3], num_rows * row_bytes, message.numel());
    if (row_scale_bytes > 0) {
      check_range(number, "scales", table[i + 4], num_rows * row_scale_bytes, message.numel());
    }
  }
}

// Which widths an op has, and the bytes of a row's scale in its messages.
struct SegmentForm {
  int max_bits = kMaxBits;
  int scale_bytes = 4;
};

// The same for ops whose scales may be given, float32, instead of being in the message.
inline void check_arguments(at::IntArrayRef table, const at::Tensor& rows,
                            const std::optional<at::Tensor>& row_scales, const at::Tensor& message,
                            SegmentForm form = {}) {
  check_segments(table, rows, message, kMinBits, form.max_bits, row_scales ? 0 : form.scale_bytes);
  if (row_scales) check_row_scales(*row_scales, rows);
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
