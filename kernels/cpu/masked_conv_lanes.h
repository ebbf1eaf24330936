// Vectors of float32 for masked_conv_body.h; the including file defines FASTVQ_VECTOR_BYTES,
// FASTVQ_REGISTERS and FASTVQ_TILE_VECTORS.
#pragma once

#include "floats.h"

namespace fastvq {
namespace {

constexpr int kRegisters = FASTVQ_REGISTERS, kTileVectors = FASTVQ_TILE_VECTORS;

}  // namespace
}  // namespace fastvq
