// The CPU kernel of unpack_dithered; megatron_moe_comp/ops/unpack_dithered.py says what it
// computes.
#include "unpack_dithered.h"

#include <torch/library.h>

#include "decoding.h"
#include "isa.h"

namespace moe_comp {
namespace {

template <typename T>
const UnpackDithered<T>& kernels_of(Isa isa) {
#if MMC_X86
  if (isa == Isa::kAvx512) return unpack_dithered_avx512<T>();
  if (isa == Isa::kAvx2) return unpack_dithered_avx2<T>();
#endif
  return unpack_dithered_generic<T>();
}

// Who sent a segment: the number of its first row there, and the random numbers used.
struct Sender {
  uint32_t first_row;
  RandomStream random;
};

template <typename T>
void unpack_dithered_rows(const uint8_t* message, T* rows, int64_t hidden,
                          const std::vector<Segment>& segments, const std::vector<Sender>& senders,
                          float largest) {
  const UnpackDithered<T>& kernels = kernels_of<T>(selected_isa());
  const bool streaming = is_streaming(segments, rows, hidden * static_cast<int64_t>(sizeof(T)));
  for_each_row(segments, hidden, [&](const Segment& segment, int64_t i) {
    const int num_bits = segment.num_bits;
    const Sender& sender = senders[segment.number];
    float scale;
    std::memcpy(&scale, message + segment.scales_offset + i * sizeof scale, sizeof scale);
    const float unit = dithered_unit_of(scale, num_bits);
    // No value is more than 4/3 scales: the top level of 2 bits, 1.5, and half a step.
    const UnpackDithered<T>& row_kernels =
        1.5f * scale <= largest ? kernels : unpack_dithered_generic<T>();
    row_kernels.decode[num_bits](
        message + segment.codes_offset + i * packed_bytes(hidden, num_bits), hidden,
        sender.first_row + static_cast<uint32_t>(i), unit, sender.random, largest,
        rows + (segment.first_row + i) * hidden, streaming);
  });
}

void unpack_dithered(const at::Tensor& message, const at::Tensor& rows, at::IntArrayRef table,
                     at::IntArrayRef table_of_senders, int64_t offset, int64_t stream) {
  const std::vector<Segment> segments = checked_segments(table, rows, std::nullopt, message);
  check_senders(table, table_of_senders);
  check_32_bits("offset", offset);
  check_32_bits("stream", stream);
  std::vector<Sender> senders;
  for (size_t i = 0; i < table_of_senders.size(); i += 2) {
    senders.push_back({static_cast<uint32_t>(table_of_senders[i]),
                       RandomStream(static_cast<uint64_t>(table_of_senders[i + 1]),
                                    static_cast<uint32_t>(offset), static_cast<uint32_t>(stream))});
  }
  const uint8_t* const bytes = message.const_data_ptr<uint8_t>();
  write_rows(rows, segments, [&](auto* values) {
    unpack_dithered_rows(bytes, values, rows.size(1), segments, senders,
                         largest_of(rows.scalar_type()));
  });
}

}  // namespace
}  // namespace moe_comp

TORCH_LIBRARY_IMPL(megatron_moe_comp, CPU, library) {
  library.impl("unpack_dithered", moe_comp::unpack_dithered);
}
