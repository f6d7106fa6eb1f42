// The CPU kernel of unpack_dequantize; megatron_moe_comp/ops/unpack_dequantize.py says what it
// computes.
#include "unpack_dequantize.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>

#include "isa.h"
#include "segments.h"

namespace moe_comp {
namespace {

// From this many bytes of rows on, which no cache keeps until they are read, stores that bypass the
// caches were measured to be faster.
constexpr int64_t kStreamingBytes = 48 << 20;

template <typename T>
const UnpackDequantize<T>& kernels_of(Isa isa) {
#if MMC_X86
  if (isa == Isa::kAvx512) return unpack_dequantize_avx512<T>();
  if (isa == Isa::kAvx2) return unpack_dequantize_avx2<T>();
#endif
  return unpack_dequantize_generic<T>();
}

// `row_scales` may be null: the scales in the message.
template <typename T>
void unpack_dequantize_rows(const uint8_t* message, const float* row_scales, T* rows,
                            int64_t hidden, const std::vector<Segment>& segments) {
  const UnpackDequantize<T>& kernels = kernels_of<T>(selected_isa());
  const int64_t row_bytes = hidden * static_cast<int64_t>(sizeof(T));
  int64_t total_bytes = 0;
  for (const Segment& segment : segments) total_bytes += segment.num_rows * row_bytes;
  const bool streaming = total_bytes >= kStreamingBytes && row_bytes % 64 == 0 &&
                         reinterpret_cast<uintptr_t>(rows) % 64 == 0;
  for_each_row(segments, hidden, [&](const Segment& segment, int64_t i) {
    const int num_bits = segment.num_bits;
    const int64_t row = segment.first_row + i;
    float scale;
    if (row_scales != nullptr) {
      scale = row_scales[row];
    } else {
      std::memcpy(&scale, message + segment.scales_offset + i * sizeof scale, sizeof scale);
    }
    const float step = step_of(scale, num_bits);
    const uint8_t* const packed =
        message + segment.codes_offset + i * packed_bytes(hidden, num_bits);
    // The vector kernels round to bfloat16 without a case for NaN.
    const UnpackDequantize<T>& row_kernels =
        std::isfinite(step) ? kernels : unpack_dequantize_generic<T>();
    row_kernels.decode[num_bits](packed, hidden, step, rows + row * hidden, streaming);
  });
}

void unpack_dequantize(const at::Tensor& message, const std::optional<at::Tensor>& row_scales,
                       const at::Tensor& rows, at::IntArrayRef table) {
  const std::vector<Segment> segments = checked_segments(table, rows, row_scales, message);
  const float* const scales = row_scales ? row_scales->const_data_ptr<float>() : nullptr;
  const uint8_t* const bytes = message.const_data_ptr<uint8_t>();
  const int64_t hidden = rows.size(1);
  if (rows.scalar_type() == at::kFloat) {
    unpack_dequantize_rows(bytes, scales, rows.mutable_data_ptr<float>(), hidden, segments);
  } else if (rows.scalar_type() == at::kBFloat16) {
    unpack_dequantize_rows(bytes, scales, static_cast<Bf16*>(rows.mutable_data_ptr()), hidden,
                           segments);
  } else {
    const at::Tensor float_rows = at::empty(rows.sizes(), rows.options().dtype(at::kFloat));
    unpack_dequantize_rows(bytes, scales, float_rows.mutable_data_ptr<float>(), hidden, segments);
    for (const Segment& segment : segments) {
      rows.narrow(0, segment.first_row, segment.num_rows)
          .copy_(float_rows.narrow(0, segment.first_row, segment.num_rows));
    }
  }
}

}  // namespace
}  // namespace moe_comp

TORCH_LIBRARY_IMPL(megatron_moe_comp, CPU, library) {
  library.impl("unpack_dequantize", moe_comp::unpack_dequantize);
}
