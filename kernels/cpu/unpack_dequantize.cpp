// The CPU kernel of unpack_dequantize; megatron_moe_comp/ops/unpack_dequantize.py says what it
// computes.
#include "unpack_dequantize.h"

#include <torch/library.h>

#include <cmath>

#include "decoding.h"
#include "isa.h"

namespace moe_comp {
namespace {

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
  const bool streaming = is_streaming(segments, rows, hidden * static_cast<int64_t>(sizeof(T)));
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
  write_rows(rows, segments, [&](auto* values) {
    unpack_dequantize_rows(bytes, scales, values, rows.size(1), segments);
  });
}

}  // namespace
}  // namespace moe_comp

TORCH_LIBRARY_IMPL(megatron_moe_comp, CPU, library) {
  library.impl("unpack_dequantize", moe_comp::unpack_dequantize);
}
