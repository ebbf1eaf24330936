// tanh and the logistic function for one instruction set's vectors; the including file defines
// FASTVQ_VECTOR_BYTES. Everything has internal linkage, as in lanes.h. No canonical rounding: where
// the compiler may fuse multiply and add, it does.
//
// tanh·σ and its two derivatives are within 8 · 2⁻²⁴ of their size (5.5 at most was found; the
// bound is tested in tests/kernels/test_cpu_gated_activation.py) down to 1e-35. NaN gives NaN.
#pragma once

#include "floats.h"

namespace fastvq {
namespace {

typedef int32_t Ints __attribute__((vector_size(FASTVQ_VECTOR_BYTES)));

inline Floats all(float value) { return Floats{} + value; }

// exp(x) to about 2 units in the last place; x is cut to −87 … 87. A NaN stays one.
inline Floats exponential(Floats x) {
  x = x > 87.0f ? all(87.0f) : x;
  x = x < -87.0f ? all(-87.0f) : x;
  const Floats magic = all(12582912.0f);  // 1.5·2²³: adding it rounds to an integer
  const Floats rounded = x * 1.44269504f + magic;
  const Floats n = rounded - magic;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  Ints bits, zero;
  memcpy(&bits, &rounded, sizeof bits);
  memcpy(&zero, &magic, sizeof zero);
  bits = (bits - zero + 127) << 23;
  Floats power;
  memcpy(&power, &bits, sizeof power);
  return p * power;
}

struct ValueAndSlope {
  Floats value, slope;
};

// With d = 1 / (exp(2|x|) + 1): |tanh x| = 1 − 2d and tanh' x = 4d(1 − d), which keeps its relative
// accuracy where tanh is nearly 1. Near zero 1 − 2d would cancel: an odd polynomial instead.
inline ValueAndSlope tangent(Floats x) {
  const Floats size = x < 0.0f ? -x : x;
  const Floats d = 1.0f / (exponential(2.0f * size) + 1.0f);
  const Floats z = x * x;
  Floats p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const Floats large = 1.0f - 2.0f * d;
  const Floats value = size < 0.625f ? p * (z * x) + x : (x < 0.0f ? -large : large);
  return {value, 4.0f * (d * (1.0f - d))};
}

// With e = exp(−|x|), q = 1 / (1 + e): σ(|x|) = q and 1 − σ(|x|) = e·q, neither by a difference.
inline ValueAndSlope logistic(Floats x) {
  const Floats e = exponential(x < 0.0f ? x : -x);
  const Floats q = 1.0f / (1.0f + e);
  const Floats rest = e * q;
  return {x < 0.0f ? rest : q, rest * q};
}

inline Floats gate(Floats a, Floats b) { return tangent(a).value * logistic(b).value; }

}  // namespace
}  // namespace fastvq
