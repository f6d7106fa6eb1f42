// The CPU kernels of gaussian_pack and gaussian_unpack; megatron_moe_comp/ops/gaussian.py says what
// they compute.
#include "gaussian.h"

#include <torch/library.h>

#include "decoding.h"
#include "isa.h"
#include "packing.h"

namespace moe_comp {
namespace {

constexpr SegmentForm kForm = {.max_bits = kMaxGaussianBits, .scale_bytes = kGaussianScaleBytes};

template <typename T>
const Gaussian<T>& kernels_of(Isa isa) {
#if MMC_X86
  if (isa == Isa::kAvx512) return gaussian_avx512<T>();
  if (isa == Isa::kAvx2) return gaussian_avx2<T>();
#endif
  return gaussian_generic<T>();
}

template <typename T>
void pack_rows(const T* rows, uint8_t* message, int64_t hidden,
               const std::vector<Segment>& segments) {
  const Gaussian<T>& kernels = kernels_of<T>(selected_isa());
  for_each_row(segments, hidden, [&](const Segment& segment, int64_t i) {
    const int num_bits = segment.num_bits;
    const T* const values = rows + (segment.first_row + i) * hidden;
    const uint16_t bits =
        hidden == 0 ? 0 : rms_bits(kernels.sum_of_squares(values, hidden), hidden);
    std::memcpy(message + segment.scales_offset + i * sizeof bits, &bits, sizeof bits);
    uint8_t* const packed = message + segment.codes_offset + i * packed_bytes(hidden, num_bits);
    const float scale = scale_of_bits(bits);
    if (scale > 0.0f) {
      kernels.encode[num_bits](values, hidden, cells_per_unit(scale), packed);
    } else {
      pack_row_of(1u << (num_bits - 1), hidden, num_bits, packed);
    }
  });
}

// The levels of a row; those of codes beyond its bits are zeros.
template <typename T>
void set_levels(uint16_t scale_bits, int num_bits, float largest, T (&levels)[kMaxLevels]) {
  const float scale = scale_of_bits(scale_bits);
  const GaussianLevels& table = kGaussianLevels[num_bits - 2];
  const int half = 1 << (num_bits - 1);
  for (int i = 0; i < half; ++i) {
    const float level = saturated(table.magnitudes[i] * scale, largest);
    levels[half + i] = from_float<T>(level);
    levels[half - 1 - i] = from_float<T>(-level);
  }
}

template <typename T>
void unpack_rows(const uint8_t* message, T* rows, int64_t hidden,
                 const std::vector<Segment>& segments, float largest) {
  const Gaussian<T>& kernels = kernels_of<T>(selected_isa());
  const bool streaming = is_streaming(segments, rows, hidden * static_cast<int64_t>(sizeof(T)));
  for_each_row(segments, hidden, [&](const Segment& segment, int64_t i) {
    const int num_bits = segment.num_bits;
    uint16_t scale_bits;
    std::memcpy(&scale_bits, message + segment.scales_offset + i * sizeof scale_bits,
                sizeof scale_bits);
    alignas(64) T levels[kMaxLevels] = {};
    set_levels(scale_bits, num_bits, largest, levels);
    kernels.decode[num_bits](
        message + segment.codes_offset + i * packed_bytes(hidden, num_bits), hidden, levels,
        rows + (segment.first_row + i) * hidden, streaming);
  });
}

void gaussian_pack(const at::Tensor& rows, const at::Tensor& message, at::IntArrayRef table) {
  const std::vector<Segment> segments = checked_segments(table, rows, std::nullopt, message, kForm);
  uint8_t* const bytes = message.mutable_data_ptr<uint8_t>();
  if (rows.scalar_type() == at::kBFloat16) {
    pack_rows(static_cast<const Bf16*>(rows.const_data_ptr()), bytes, rows.size(1), segments);
  } else {
    const at::Tensor float_rows = rows.to(at::kFloat);
    pack_rows(float_rows.const_data_ptr<float>(), bytes, rows.size(1), segments);
  }
}

void gaussian_unpack(const at::Tensor& message, const at::Tensor& rows, at::IntArrayRef table) {
  const std::vector<Segment> segments = checked_segments(table, rows, std::nullopt, message, kForm);
  const uint8_t* const bytes = message.const_data_ptr<uint8_t>();
  write_rows(rows, segments, [&](auto* values) {
    unpack_rows(bytes, values, rows.size(1), segments, largest_of(rows.scalar_type()));
  });
}

}  // namespace
}  // namespace moe_comp

TORCH_LIBRARY_IMPL(megatron_moe_comp, CPU, library) {
  library.impl("gaussian_pack", moe_comp::gaussian_pack);
  library.impl("gaussian_unpack", moe_comp::gaussian_unpack);
}
