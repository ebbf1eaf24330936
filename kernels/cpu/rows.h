// Rows of float32, float16 or bfloat16 numbers read as float32, which holds every one of them
// exactly. Everything here has internal linkage: each instruction set compiles its own copy.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastvq {

enum DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

namespace {

inline int64_t bytes_of_element(int dtype) { return dtype == kFloat32 ? 4 : 2; }

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float to_float(float value) { return value; }

struct Half {
  uint16_t bits;
};

// The 15 low bits moved into a float32's exponent and fraction mean the same number divided by
// 2^112; multiplying by 2^112 is exact, subnormals included. Inf and NaN get float32's exponent.
inline float to_float(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  const float scaled = float_of_bits(magnitude << 13) * 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &scaled, sizeof bits);
  bits |= magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return float_of_bits(bits | sign);
}

struct BFloat {
  uint16_t bits;
};

inline float to_float(BFloat value) {
  return float_of_bits(static_cast<uint32_t>(value.bits) << 16);
}

// The nearest Element, ties to even; what is too large becomes Inf, and NaN stays NaN.
template <class Element>
Element rounded(float value);

template <>
inline float rounded<float>(float value) {
  return value;
}

inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

template <>
inline BFloat rounded<BFloat>(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return BFloat{static_cast<uint16_t>(value != value ? 0x7fc0u : nearest)};
}

// Below the least normal half, adding 0.5 leaves in a float32's fraction the half's own, rounded by
// the addition. Above, the exponent is moved and the 13 excess bits rounded away.
template <>
inline Half rounded<Half>(float value) {
  const uint32_t bits = bits_of_float(value), magnitude = bits & 0x7fffffffu;
  const uint32_t small = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  uint32_t half = magnitude < 0x38800000u ? small : normal;
  half = magnitude >= 0x477ff000u ? large : half;
  return Half{static_cast<uint16_t>((bits >> 16 & 0x8000u) | half)};
}

template <class Element>
inline void read_elements(const void* data, int64_t first, int64_t count, float* out) {
  const Element* source = static_cast<const Element*>(data) + first;
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(source[i]);
}

// out[i] = data[first + i] as float32, for i < count.
inline void read_floats(const void* data, int dtype, int64_t first, int64_t count, float* out) {
  if (dtype == kFloat32) {
    read_elements<float>(data, first, count, out);
  } else if (dtype == kFloat16) {
    read_elements<Half>(data, first, count, out);
  } else {
    read_elements<BFloat>(data, first, count, out);
  }
}

inline bool is_finite(float value) { return value - value == 0.0f; }

}  // namespace
}  // namespace fastvq
