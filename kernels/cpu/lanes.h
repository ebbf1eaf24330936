// Vectors of 16 floats and 8 doubles that every instruction set computes alike: lane by lane, no
// fused operations, one order of adding the lanes up. Wider registers are faster, never different.
// Everything has internal linkage and uses nothing of the C++ standard library: each instruction
// set compiles its own copy.
#pragma once

#include <stdint.h>
#include <string.h>

#include "rows.h"

// Says that instruction sets pass vectors differently; these never leave their file.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace fastvq {
namespace {

constexpr int64_t kFloatLanes = 16, kDoubleLanes = 8;
typedef float Floats __attribute__((vector_size(64)));
typedef float HalfFloats __attribute__((vector_size(32)));
typedef double Doubles __attribute__((vector_size(64)));

#define FASTVQ_INLINE inline __attribute__((always_inline))

// Copies count < 16 elements in pieces of constant size: a short memcpy of unknown size is a call.
template <class Element>
FASTVQ_INLINE void copy_few(const Element* from, int64_t count, Element* to) {
  for (int64_t piece = 8; piece > 0; piece /= 2) {
    if (!(count & piece)) continue;
    if (piece == 8) memcpy(to, from, 8 * sizeof(Element));
    if (piece == 4) memcpy(to, from, 4 * sizeof(Element));
    if (piece == 2) memcpy(to, from, 2 * sizeof(Element));
    if (piece == 1) memcpy(to, from, sizeof(Element));
    from += piece;
    to += piece;
  }
}

// The first `count` ≤ lanes elements from `from` as floats; the other lanes are zero.
template <class Vector, class Element>
FASTVQ_INLINE Vector load_floats(const Element* from, int64_t count) {
  constexpr int64_t kLanes = sizeof(Vector) / sizeof(float);
  Element elements[kLanes];
  if (count == kLanes) {
    memcpy(elements, from, sizeof elements);
  } else {
    memset(elements, 0, sizeof elements);
    copy_few(from, count, elements);
  }
  float floats[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) floats[i] = to_float(elements[i]);
  Vector vector;
  memcpy(&vector, floats, sizeof vector);
  return vector;
}

// Writes the first `count` ≤ 16 lanes, each rounded to Element.
template <class Element>
FASTVQ_INLINE void store_floats(Floats vector, Element* to, int64_t count) {
  float floats[kFloatLanes];
  memcpy(floats, &vector, sizeof vector);
  Element elements[kFloatLanes];
  for (int64_t i = 0; i < kFloatLanes; ++i) elements[i] = rounded<Element>(floats[i]);
  if (count == kFloatLanes) {
    memcpy(to, elements, sizeof elements);
  } else {
    copy_few(elements, count, to);
  }
}

FASTVQ_INLINE float sum_of_lanes(Floats vector) {
  float lanes[kFloatLanes];
  memcpy(lanes, &vector, sizeof vector);
  for (int64_t half = kFloatLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

}  // namespace
}  // namespace fastvq
