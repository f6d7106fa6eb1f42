// The CPU kernel of quantize_pack; megatron_moe_comp/ops/quantize_pack.py says what it computes.
#include "quantize_pack.h"

#include <torch/library.h>

#include "isa.h"
#include "packing.h"
#include "segments.h"

namespace moe_comp {
namespace {

template <typename T>
const QuantizePack<T>& kernels_of(Isa isa) {
#if MMC_X86
  if (isa == Isa::kAvx512) return quantize_pack_avx512<T>();
  if (isa == Isa::kAvx2) return quantize_pack_avx2<T>();
#endif
  return quantize_pack_generic<T>();
}

// `row_scales` may be null: each row's largest magnitude, which then goes into the message too.
template <typename T>
void quantize_pack_rows(const T* rows, const float* row_scales, uint8_t* message, int64_t hidden,
                        const std::vector<Segment>& segments, const RandomStream& random,
                        bool mid_rise) {
  const QuantizePack<T>& kernels = kernels_of<T>(selected_isa());
  for_each_row(segments, hidden, [&](const Segment& segment, int64_t i) {
    const int num_bits = segment.num_bits;
    const int64_t row = segment.first_row + i;
    const T* const values = rows + row * hidden;
    float scale;
    if (row_scales != nullptr) {
      scale = row_scales[row];
    } else {
      scale = scale_from_absmax_bits(kernels.absmax_bits(values, hidden));
      std::memcpy(message + segment.scales_offset + i * sizeof scale, &scale, sizeof scale);
    }
    uint8_t* const packed = message + segment.codes_offset + i * packed_bytes(hidden, num_bits);
    if (is_usable(scale)) {
      const float top = top_of(num_bits, mid_rise);
      kernels.encode[num_bits](values, hidden, static_cast<uint32_t>(row), inverse_of(scale, top),
                               top, random, packed);
    } else {
      pack_row_of(levels(num_bits), hidden, num_bits, packed);
    }
  });
}

void quantize_pack(const at::Tensor& rows, const std::optional<at::Tensor>& row_scales,
                   const at::Tensor& message, at::IntArrayRef table, int64_t key, int64_t offset,
                   int64_t stream, bool mid_rise) {
  const std::vector<Segment> segments = checked_segments(table, rows, row_scales, message);
  check_32_bits("offset", offset);
  check_32_bits("stream", stream);
  const RandomStream random(static_cast<uint64_t>(key), static_cast<uint32_t>(offset),
                            static_cast<uint32_t>(stream));
  const float* const scales = row_scales ? row_scales->const_data_ptr<float>() : nullptr;
  uint8_t* const bytes = message.mutable_data_ptr<uint8_t>();
  const int64_t hidden = rows.size(1);
  if (rows.scalar_type() == at::kBFloat16) {
    quantize_pack_rows(static_cast<const Bf16*>(rows.const_data_ptr()), scales, bytes, hidden,
                       segments, random, mid_rise);
  } else {
    const at::Tensor float_rows = rows.to(at::kFloat);
    quantize_pack_rows(float_rows.const_data_ptr<float>(), scales, bytes, hidden, segments, random,
                       mid_rise);
  }
}

}  // namespace
}  // namespace moe_comp

TORCH_LIBRARY_IMPL(megatron_moe_comp, CPU, library) {
  library.impl("quantize_pack", moe_comp::quantize_pack);
}
