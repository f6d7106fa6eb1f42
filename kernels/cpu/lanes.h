// Index vectors for byte permutations, computed at compile time.
#pragma once

#include <cstdint>

namespace moe_comp {

template <int kSize>
struct alignas(kSize) ByteIndex {
  uint8_t of[kSize];
};

// index(i) for every byte i.
template <int kSize, typename Index>
constexpr ByteIndex<kSize> byte_index(Index index) {
  ByteIndex<kSize> result{};
  for (int i = 0; i < kSize; ++i) result.of[i] = static_cast<uint8_t>(index(i));
  return result;
}

}  // namespace moe_comp
