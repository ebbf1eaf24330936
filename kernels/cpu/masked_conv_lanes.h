// Vectors of float32 for masked_conv_body.h; the including file defines FASTVQ_VECTOR_BYTES,
// FASTVQ_REGISTERS and FASTVQ_TILE_VECTORS.
#pragma once

#include <stdint.h>
#include <string.h>

namespace fastvq {
namespace {

constexpr int64_t kLanes = FASTVQ_VECTOR_BYTES / 4;
constexpr int kRegisters = FASTVQ_REGISTERS, kTileVectors = FASTVQ_TILE_VECTORS;
typedef float Floats __attribute__((vector_size(FASTVQ_VECTOR_BYTES)));

inline Floats load(const float* from) {
  Floats vector;
  memcpy(&vector, from, sizeof vector);
  return vector;
}
inline void store(float* to, Floats vector) { memcpy(to, &vector, sizeof vector); }

}  // namespace
}  // namespace fastvq
