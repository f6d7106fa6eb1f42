// Functions of kernels/quantize_math.cuh for the tests to call.
#include "quantize_math.cuh"

extern "C" {

void philox(const uint32_t counter[4], uint64_t key, uint32_t words[4]) {
  moe_comp::philox4x32(counter[0], counter[1], counter[2], counter[3], key, words);
}

void inverses(const float* scales, int64_t size, int num_bits, bool mid_rise, float* result) {
  const float top = moe_comp::top_of(num_bits, mid_rise);
  for (int64_t i = 0; i < size; ++i) result[i] = moe_comp::inverse_of(scales[i], top);
}

}  // extern "C"
