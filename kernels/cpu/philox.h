// What the vector kernels share of Philox4x32-10: keys and rounds that many groups have in common.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../quantize_math.cuh"

namespace moe_comp {

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;

// Which random numbers a call uses. The round keys are spread over the 64-bit lanes of a vector
// register, so that a kernel reads them as memory operands.
struct alignas(64) RandomStream {
  RandomStream(uint64_t key, uint32_t offset, uint32_t stream)
      : key(key), offset(offset), stream(stream) {
    // One loop for both is what GCC 12 miscompiles at -O3.
    spread_keys<0>(static_cast<uint32_t>(key), 0x9E3779B9u);
    spread_keys<1>(static_cast<uint32_t>(key >> 32), 0xBB67AE85u);
  }

  template <int kWord>
  void spread_keys(uint32_t round_key, uint32_t increment) {
    for (auto& keys : round_keys) {
      std::fill_n(keys[kWord], 8, round_key);
      round_key += increment;
    }
  }

  uint64_t round_keys[kPhiloxRounds][2][8];
  uint64_t key;
  uint32_t offset;
  uint32_t stream;
};

// The part of the first two Philox rounds that is the same for all groups of a row.
struct PhiloxRow {
  PhiloxRow(uint32_t row, const RandomStream& random) {
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * random.offset;
    const uint32_t c0 =
        static_cast<uint32_t>(product1 >> 32) ^ row ^ static_cast<uint32_t>(random.key);
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * c0;
    round1_c2 = random.stream ^ static_cast<uint32_t>(random.key >> 32);
    round2_c0 = static_cast<uint32_t>(product1) ^ static_cast<uint32_t>(random.round_keys[1][0][0]);
    round2_c2 =
        static_cast<uint32_t>(product0 >> 32) ^ static_cast<uint32_t>(random.round_keys[1][1][0]);
    round3_c2 = static_cast<uint32_t>(product0) ^ static_cast<uint32_t>(random.round_keys[2][1][0]);
  }

  uint32_t round1_c2;  // what the new c2 of round 1 is made of beside hi(M0 * group), and so on
  uint32_t round2_c0;
  uint32_t round2_c2;
  uint32_t round3_c2;
};

}  // namespace moe_comp
