// The CPU kernels of cast_pack and unpack_cast; megatron_moe_comp/ops/cast_pack.py says what they
// compute.
#include "cast_pack.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string_view>

#include "../segment_checks.h"
#include "isa.h"
#include "segments.h"

namespace moe_comp {
namespace {

struct Format {
  std::string_view name;
  int num_bits;         // of a number
  int64_t scale_bytes;  // of a scale; 0 without scales
  int64_t block;        // values that share a scale
};

constexpr Format kFormats[kNumCastFormats] = {
    {"bf16", 16, 0, 1}, {"fp16", 16, 0, 1}, {"fp8", 8, 4, 128}, {"mxfp8", 8, 1, 32}};

CastFormat format_of(std::string_view name) {
  int i = 0;
  while (i < kNumCastFormats && kFormats[i].name != name) ++i;
  TORCH_CHECK_VALUE(i < kNumCastFormats, "format must be bf16, fp16, fp8 or mxfp8, not ", name);
  return static_cast<CastFormat>(i);
}

const CastPack& kernels_of(at::ScalarType type) {
  const CastRows rows = type == at::kFloat      ? kFloat32Rows
                        : type == at::kBFloat16 ? kBfloat16Rows
                                                : kFloat16Rows;
  const Isa isa = selected_isa();
#if MMC_X86
  if (isa == Isa::kAvx512) return cast_pack_avx512(rows);
  if (isa == Isa::kAvx2) return cast_pack_avx2(rows);
#endif
  return cast_pack_generic(rows);
}

// Rows of other types are converted to and from float32.
bool has_kernel(const at::Tensor& rows) {
  const at::ScalarType type = rows.scalar_type();
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

// What a call works on, checked.
struct Cast {
  Cast(const at::Tensor& rows, const at::Tensor& message, at::IntArrayRef table,
       std::string_view name)
      : format(format_of(name)), hidden(rows.size(-1)) {
    const Format& f = kFormats[format];
    number_bytes = packed_bytes(hidden, f.num_bits);
    scale_bytes = (hidden + f.block - 1) / f.block * f.scale_bytes;
    check_segments(table, rows, message, f.num_bits, f.num_bits, scale_bytes);
    segments = segments_of(table);
  }

  // Calls `visit(row, numbers, scales)` for every row, with its bytes' offsets in the message.
  template <typename Visit>
  void for_each(const Visit& visit) const {
    for_each_row(segments, hidden, [&](const Segment& segment, int64_t i) {
      visit(segment.first_row + i, segment.codes_offset + i * number_bytes,
            segment.scales_offset + i * scale_bytes);
    });
  }

  CastFormat format;
  int64_t hidden;
  int64_t number_bytes;  // of a row
  int64_t scale_bytes;   // of a row
  std::vector<Segment> segments;
};

void cast_pack(const at::Tensor& rows, const at::Tensor& message, at::IntArrayRef table,
               std::string_view format) {
  const Cast cast(rows, message, table, format);
  const at::Tensor source = has_kernel(rows) ? rows : rows.to(at::kFloat);
  const auto encode = kernels_of(source.scalar_type()).encode[cast.format];
  const auto* const values = static_cast<const uint8_t*>(source.const_data_ptr());
  const int64_t row_bytes = cast.hidden * static_cast<int64_t>(source.element_size());
  uint8_t* const bytes = message.mutable_data_ptr<uint8_t>();
  cast.for_each([&](int64_t row, int64_t numbers, int64_t scales) {
    encode(values + row * row_bytes, cast.hidden, bytes + numbers, bytes + scales);
  });
}

void unpack_cast(const at::Tensor& message, const at::Tensor& rows, at::IntArrayRef table,
                 std::string_view format) {
  const Cast cast(rows, message, table, format);
  const at::Tensor target =
      has_kernel(rows) ? rows : at::empty(rows.sizes(), rows.options().dtype(at::kFloat));
  const auto decode = kernels_of(target.scalar_type()).decode[cast.format];
  auto* const values = static_cast<uint8_t*>(target.mutable_data_ptr());
  const int64_t row_bytes = cast.hidden * static_cast<int64_t>(target.element_size());
  const uint8_t* const bytes = message.const_data_ptr<uint8_t>();
  cast.for_each([&](int64_t row, int64_t numbers, int64_t scales) {
    decode(bytes + numbers, bytes + scales, cast.hidden, values + row * row_bytes);
  });
  if (target.is_same(rows)) return;
  for (const Segment& segment : cast.segments) {
    rows.narrow(0, segment.first_row, segment.num_rows)
        .copy_(target.narrow(0, segment.first_row, segment.num_rows));
  }
}

}  // namespace
}  // namespace moe_comp

TORCH_LIBRARY_IMPL(megatron_moe_comp, CPU, library) {
  library.impl("cast_pack", moe_comp::cast_pack);
  library.impl("unpack_cast", moe_comp::unpack_cast);
}
