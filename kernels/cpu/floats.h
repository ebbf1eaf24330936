// Vectors of one instruction set's width: the including file defines FASTVQ_VECTOR_BYTES.
// Everything has internal linkage, as in lanes.h, whose vectors have the same width everywhere.
#pragma once

#include <stdint.h>
#include <string.h>

namespace fastvq {
namespace {

constexpr int64_t kLanes = FASTVQ_VECTOR_BYTES / 4;
typedef float Floats __attribute__((vector_size(FASTVQ_VECTOR_BYTES)));

inline Floats load(const float* from) {
  Floats vector;
  memcpy(&vector, from, sizeof vector);
  return vector;
}
inline void store(float* to, Floats vector) { memcpy(to, &vector, sizeof vector); }

}  // namespace
}  // namespace fastvq
