// Vectors of 16 or 8 numbers that every instruction set computes alike: lane by lane, no
// fused operations, one order of adding the lanes up. Wider registers are faster, never different.
// Everything has internal linkage and uses nothing of the C++ standard library: each instruction
// set compiles its own copy.
#pragma once

#include <stdint.h>
#include <string.h>

#include "rows.h"

namespace fastvq {
namespace {

typedef float Floats16 __attribute__((vector_size(64)));
typedef float Floats8 __attribute__((vector_size(32)));
typedef double Doubles8 __attribute__((vector_size(64)));

#define FASTVQ_INLINE inline __attribute__((always_inline))

// Copies count < kCapacity ≤ 16 elements in pieces of constant size: a short memcpy of unknown size
// is a call.
template <int64_t kCapacity, class Element>
FASTVQ_INLINE void copy_few(const Element* from, int64_t count, Element* to) {
  for (int64_t piece = kCapacity / 2; piece > 0; piece /= 2) {
    if (!(count & piece)) continue;
    if (piece == 8) memcpy(to, from, 8 * sizeof(Element));
    if (piece == 4) memcpy(to, from, 4 * sizeof(Element));
    if (piece == 2) memcpy(to, from, 2 * sizeof(Element));
    if (piece == 1) memcpy(to, from, sizeof(Element));
    from += piece;
    to += piece;
  }
}

// A half-precision element becomes a float in some ten instructions: one copy for all callers, or
// the compiler unrolls them everywhere.
template <class Vector, class Element>
__attribute__((noinline)) Vector load_halves(const Element* from, int64_t count) {
  constexpr int64_t kLanes = sizeof(Vector) / sizeof(float);
  float floats[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) floats[i] = to_float(from[i]);
  Vector vector;
  memcpy(&vector, floats, sizeof vector);
  return vector;
}

template <class Vector, class Element>
__attribute__((noinline)) void store_halves(Vector vector, Element* to, int64_t count) {
  constexpr int64_t kLanes = sizeof(Vector) / sizeof(float);
  float floats[kLanes];
  memcpy(floats, &vector, sizeof vector);
  for (int64_t i = 0; i < count; ++i) to[i] = rounded<Element>(floats[i]);
}

// The first `count` ≤ lanes elements from `from` as floats; the other lanes are zero.
template <class Vector, class Element>
FASTVQ_INLINE Vector load_floats(const Element* from, int64_t count) {
  if (sizeof(Element) < sizeof(float)) return load_halves<Vector>(from, count);
  Vector vector = {};
  if (count == sizeof(Vector) / sizeof(float)) {
    memcpy(&vector, from, sizeof vector);
  } else {
    copy_few<sizeof(Vector) / sizeof(float)>(from, count, reinterpret_cast<Element*>(&vector));
  }
  return vector;
}

// Writes the first `count` ≤ lanes lanes, each rounded to Element.
template <class Vector, class Element>
FASTVQ_INLINE void store_floats(Vector vector, Element* to, int64_t count) {
  if (sizeof(Element) < sizeof(float)) return store_halves(vector, to, count);
  if (count == sizeof(Vector) / sizeof(float)) {
    memcpy(to, &vector, sizeof vector);
  } else {
    copy_few<sizeof(Vector) / sizeof(float)>(reinterpret_cast<const Element*>(&vector), count, to);
  }
}

// Halves are added to each other until one lane is left.
FASTVQ_INLINE float sum_of_lanes(Floats8 vector) {
  typedef float Floats4 __attribute__((vector_size(16)));
  Floats4 halves[2];
  memcpy(halves, &vector, sizeof vector);
  const Floats4 sum = halves[0] + halves[1];
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

FASTVQ_INLINE float sum_of_lanes(Floats16 vector) {
  Floats8 halves[2];
  memcpy(halves, &vector, sizeof vector);
  return sum_of_lanes(halves[0] + halves[1]);
}

}  // namespace
}  // namespace fastvq
