// The row kernels of cast_pack and unpack_cast, in vectors of the compiler. A file includes this
// once for its instruction set, MMC_TARGET, and its number of lanes, kLanes.
#pragma once

#include <cstring>
#include <type_traits>
#include <utility>

#include "../quantize_math.cuh"
#include "cast_pack.h"

#define MMC_TARGET_INLINE MMC_TARGET __attribute__((always_inline)) inline

namespace moe_comp {
namespace {

template <typename T>
struct VectorOf {
  typedef T Type __attribute__((vector_size(kLanes * sizeof(T))));
};
using Floats = VectorOf<float>::Type;
using Ints = VectorOf<int32_t>::Type;  // signed, because vectors of these are compared everywhere
using Lanes = std::make_index_sequence<kLanes>;

constexpr int32_t kInf = kInfBits;
constexpr int32_t kMagnitude = 0x7fffffff;

MMC_TARGET_INLINE Floats as_floats(Ints bits) { return reinterpret_cast<Floats>(bits); }
MMC_TARGET_INLINE Ints as_ints(Floats x) { return reinterpret_cast<Ints>(x); }
MMC_TARGET_INLINE Ints smaller(Ints a, Ints b) { return a < b ? a : b; }
MMC_TARGET_INLINE Ints larger(Ints a, Ints b) { return a > b ? a : b; }
MMC_TARGET_INLINE Ints all(int32_t x) { return Ints{} + x; }
MMC_TARGET_INLINE Ints magnitude_of(Floats x) { return as_ints(x) & kMagnitude; }

// The sign of x as bit kBit.
template <int kBit>
MMC_TARGET_INLINE Ints sign_of(Floats x) {
  return as_ints(x) >> (31 - kBit) & (1 << kBit);
}

// The code of a magnitude, rounded to nearest, ties to even, in a format with kMantissa bits behind
// the point and normal numbers from 2^kMinExponent on; at most that of the largest number.
template <int kMantissa, int kMinExponent>
MMC_TARGET_INLINE Ints code_of(Ints magnitude) {
  constexpr int32_t kMin = (127 + kMinExponent) << 23;
  const Ints exponent = larger(magnitude & kInf, all(kMin));
  // The last digit of a number this much larger is the last one of the code.
  const Ints anchor = exponent + ((23 - kMantissa) << 23);
  const Ints sum = as_ints(as_floats(magnitude) + as_floats(anchor));
  return sum - anchor + ((exponent - kMin) >> (23 - kMantissa));
}

// The magnitude of a finite code, as the bits of a float32; inverts code_of.
template <int kMantissa, int kMinExponent>
MMC_TARGET_INLINE Ints magnitude_of_code(Ints code) {
  constexpr int32_t kMin = (127 + kMinExponent) << 23;
  const Ints normal = (code << (23 - kMantissa)) + (kMin - (1 << 23));
  // A subnormal number is a normal one less what that adds to it.
  const Floats subnormal = as_floats(normal + (1 << 23)) - as_floats(all(kMin));
  return code < (1 << kMantissa) ? as_ints(subnormal) : normal;
}

// What is in memory: its bits in the low part of each lane, and what they mean. Finite values
// beyond the range of a type become its largest.
struct Fp32 {
  using Bits = int32_t;
  static MMC_TARGET_INLINE Ints bits(Floats x) { return as_ints(x); }
  static MMC_TARGET_INLINE Floats value(Ints bits) { return as_floats(bits); }
};

struct Bf16 {
  using Bits = uint16_t;
  static MMC_TARGET_INLINE Ints bits(Floats x) {
    const Ints magnitude = magnitude_of(x);
    const Ints rounded = (magnitude + 0x7fff + (magnitude >> 16 & 1)) >> 16;
    const Ints code = magnitude < kInf ? smaller(rounded, all(0x7f7f)) : magnitude >> 16;
    // NaN as torch's vectors convert it.
    return magnitude > kInf ? all(0xffff) : code | sign_of<15>(x);
  }
  static MMC_TARGET_INLINE Floats value(Ints bits) { return as_floats(bits << 16); }
};

struct Fp16 {
  using Bits = uint16_t;
  static MMC_TARGET_INLINE Ints bits(Floats x) {
    const Ints magnitude = magnitude_of(x);
    const Ints largest = all(0x477fe000);  // 65504
    const Ints finite = code_of<10, -14>(smaller(magnitude, largest));
    // NaN is quiet and keeps its upper bits.
    const Ints nan = (magnitude >> 13 & 0x3ff) | 0x7e00;
    const Ints special = magnitude > kInf ? nan : all(0x7c00);
    return (magnitude < kInf ? finite : special) | sign_of<15>(x);
  }
  static MMC_TARGET_INLINE Floats value(Ints bits) {
    const Ints code = bits & 0x7fff;
    const Ints finite = magnitude_of_code<10, -14>(code);
    return as_floats((code < 0x7c00 ? finite : code << 13 | kInf) | (bits & 0x8000) << 16);
  }
};

// Without infinities; `bits` is for numbers alone.
struct E4m3 {
  using Bits = uint8_t;
  static MMC_TARGET_INLINE Ints bits(Floats x) {
    const Ints largest = all(0x43e00000);  // 448
    return code_of<3, -6>(smaller(magnitude_of(x), largest)) | sign_of<7>(x);
  }
  static MMC_TARGET_INLINE Floats value(Ints bits) {
    const Ints code = bits & 0x7f;
    const Ints magnitude = code < 0x7f ? magnitude_of_code<3, -6>(code) : all(kNanBits);
    return as_floats(magnitude | (bits & 0x80) << 24);
  }
};

// The E4M3 numbers of a block that holds NaN or infinity.
struct E4m3Nan {
  using Bits = uint8_t;
  static MMC_TARGET_INLINE Ints bits(Floats x) {
    return magnitude_of(x) > kInf ? sign_of<7>(x) | 0x7f : all(0x7f);
  }
};

struct Unscaled {
  MMC_TARGET_INLINE Floats of(Floats x) const { return x; }
};

struct Times {
  float factor;
  MMC_TARGET_INLINE Floats of(Floats x) const { return x * factor; }
};

struct DividedBy {
  float divisor;
  MMC_TARGET_INLINE Floats of(Floats x) const { return x / divisor; }
};

// How fp8 scales a block: by a float32.
struct Float32Scale {
  using Bits = float;
  static constexpr int64_t kBlock = 128;
  // The scale of a block whose largest magnitude is finite. Any one that rounds its values to zero
  // will do for a block of zeros.
  static Bits of(float absmax) { return absmax < kSmallestScale ? 1.0f : absmax / 448.0f; }
  static Bits nan() { return bits_float(kNanBits); }
  static Times value(Bits scale) { return {scale}; }
  static DividedBy inverse(Bits scale) { return {scale}; }
};

// How mxfp8 scales a block: by a power of two, E8M0.
struct E8m0Scale {
  using Bits = uint8_t;
  static constexpr int64_t kBlock = 32;
  static Bits of(float absmax) {
    const int exponent = static_cast<int>(float_bits(absmax) >> 23) - 8;  // 448 is 1.75 * 2^8
    return static_cast<Bits>(exponent < 0 ? 0 : exponent);
  }
  static Bits nan() { return 255; }
  static Times value(Bits scale) {
    if (scale == nan()) return {bits_float(kNanBits)};
    return {bits_float(scale == 0 ? 1u << 22 : static_cast<uint32_t>(scale) << 23)};
  }
  static Times inverse(Bits scale) { return {bits_float((254u - scale) << 23)}; }
};

// The bits of `count` values, a lane each, and zeros.
template <typename T>
MMC_TARGET_INLINE Ints load(const uint8_t* bytes, int64_t count) {
  typename VectorOf<typename T::Bits>::Type bits{};
  std::memcpy(&bits, bytes, count * sizeof(typename T::Bits));
  return __builtin_convertvector(bits, Ints);
}

template <typename T>
MMC_TARGET_INLINE void store(Ints lanes, int64_t count, uint8_t* bytes) {
  const auto bits = __builtin_convertvector(lanes, typename VectorOf<typename T::Bits>::Type);
  std::memcpy(bytes, &bits, count * sizeof(typename T::Bits));
}

template <typename From, typename To, typename Scale>
MMC_TARGET_INLINE void convert_vector(const uint8_t* from, int64_t count, uint8_t* to,
                                      Scale scale) {
  store<To>(To::bits(scale.of(From::value(load<From>(from, count)))), count, to);
}

// Converts `count` values that lie together.
template <typename From, typename To, typename Scale>
MMC_TARGET_INLINE void convert(const uint8_t* from, int64_t count, uint8_t* to, Scale scale) {
  if constexpr (std::is_same_v<From, To>) {
    std::memcpy(to, from, count * sizeof(typename From::Bits));
    return;
  }
  for (; count >= kLanes; count -= kLanes) {
    convert_vector<From, To>(from, kLanes, to, scale);
    from += kLanes * sizeof(typename From::Bits);
    to += kLanes * sizeof(typename To::Bits);
  }
  if (count > 0) convert_vector<From, To>(from, count, to, scale);
}

// The larger ones of lanes kHalf apart, and so on.
template <int kHalf, size_t... kLane>
MMC_TARGET_INLINE Ints larger_lanes(Ints x, std::index_sequence<kLane...> lanes) {
  if constexpr (kHalf == 0) {
    return x;
  } else {
    return larger_lanes<kHalf / 2>(larger(x, Ints{x[kLane ^ kHalf]...}), lanes);
  }
}

// The largest magnitude of some values, as the bits of a float32.
template <typename T>
MMC_TARGET_INLINE int32_t absmax_bits(const uint8_t* values, int64_t count) {
  Ints max{};
  for (; count >= kLanes; count -= kLanes) {
    max = larger(max, magnitude_of(T::value(load<T>(values, kLanes))));
    values += kLanes * sizeof(typename T::Bits);
  }
  if (count > 0) max = larger(max, magnitude_of(T::value(load<T>(values, count))));
  return larger_lanes<kLanes / 2>(max, Lanes())[0];
}

template <typename T, typename Scale>
MMC_TARGET_INLINE void encode_block(const uint8_t* values, int64_t count, uint8_t* numbers,
                                    uint8_t* scale_bytes) {
  const int32_t absmax = absmax_bits<T>(values, count);
  const bool finite = absmax < kInf;
  const typename Scale::Bits scale = finite ? Scale::of(bits_float(absmax)) : Scale::nan();
  std::memcpy(scale_bytes, &scale, sizeof scale);
  if (finite) {
    convert<T, E4m3>(values, count, numbers, Scale::inverse(scale));
  } else {
    convert<T, E4m3Nan>(values, count, numbers, Unscaled());
  }
}

template <typename T, typename Scale>
MMC_TARGET_INLINE void decode_block(const uint8_t* numbers, const uint8_t* scale_bytes,
                                    int64_t count, uint8_t* values) {
  typename Scale::Bits scale;
  std::memcpy(&scale, scale_bytes, sizeof scale);
  convert<E4m3, T>(numbers, count, values, Scale::value(scale));
}

template <typename T, typename Scale>
MMC_TARGET void encode_blocks(const void* row, int64_t hidden, uint8_t* numbers, uint8_t* scales) {
  const auto* values = static_cast<const uint8_t*>(row);
  for (; hidden >= Scale::kBlock; hidden -= Scale::kBlock) {
    encode_block<T, Scale>(values, Scale::kBlock, numbers, scales);
    values += Scale::kBlock * sizeof(typename T::Bits);
    numbers += Scale::kBlock;
    scales += sizeof(typename Scale::Bits);
  }
  if (hidden > 0) encode_block<T, Scale>(values, hidden, numbers, scales);
}

template <typename T, typename Scale>
MMC_TARGET void decode_blocks(const uint8_t* numbers, const uint8_t* scales, int64_t hidden,
                              void* row) {
  auto* values = static_cast<uint8_t*>(row);
  for (; hidden >= Scale::kBlock; hidden -= Scale::kBlock) {
    decode_block<T, Scale>(numbers, scales, Scale::kBlock, values);
    values += Scale::kBlock * sizeof(typename T::Bits);
    numbers += Scale::kBlock;
    scales += sizeof(typename Scale::Bits);
  }
  if (hidden > 0) decode_block<T, Scale>(numbers, scales, hidden, values);
}

template <typename T, typename Number>
MMC_TARGET void encode_cast(const void* row, int64_t hidden, uint8_t* numbers, uint8_t*) {
  convert<T, Number>(static_cast<const uint8_t*>(row), hidden, numbers, Unscaled());
}

template <typename T, typename Number>
MMC_TARGET void decode_cast(const uint8_t* numbers, const uint8_t*, int64_t hidden, void* row) {
  convert<Number, T>(numbers, hidden, static_cast<uint8_t*>(row), Unscaled());
}

template <typename T>
constexpr CastPack kCastsOf = {
    {encode_cast<T, Bf16>, encode_cast<T, Fp16>, encode_blocks<T, Float32Scale>,
     encode_blocks<T, E8m0Scale>},
    {decode_cast<T, Bf16>, decode_cast<T, Fp16>, decode_blocks<T, Float32Scale>,
     decode_blocks<T, E8m0Scale>}};

constexpr CastPack kCastPack[kNumCastRows] = {kCastsOf<Fp32>, kCastsOf<Bf16>, kCastsOf<Fp16>};

}  // namespace
}  // namespace moe_comp
