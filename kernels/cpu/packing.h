// Codes of a group of eight columns as bits, in portable C++.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../quantize_math.cuh"

namespace moe_comp {

// Writes the lowest bits of a stream, the lowest byte first; returns where the next byte goes.
inline uint8_t* put_bits(uint64_t bit_stream, int num_bits, uint8_t* packed) {
  for (int i = 0; i < num_bits; i += 8) *packed++ = static_cast<uint8_t>(bit_stream >> i);
  return packed;
}

// The bits of the bytes that hold `num_bits` bits, the lowest byte first.
inline uint64_t get_bits(const uint8_t* packed, int num_bits) {
  uint64_t bit_stream = 0;
  for (int i = 0; i < num_bits; i += 8) bit_stream |= static_cast<uint64_t>(*packed++) << i;
  return bit_stream;
}

// Writes a row of equal codes.
inline void pack_row_of(uint32_t code, int64_t hidden, int num_bits, uint8_t* packed) {
  for (int64_t column = 0; column < hidden; column += 8) {
    const int num_values = static_cast<int>(std::min<int64_t>(8, hidden - column));
    uint64_t bit_stream = 0;
    for (int i = 0; i < num_values; ++i) {
      bit_stream |= static_cast<uint64_t>(code) << (i * num_bits);
    }
    packed = put_bits(bit_stream, num_values * num_bits, packed);
  }
}

}  // namespace moe_comp
