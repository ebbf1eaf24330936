// Convolutions over live taps in float32 products: included once per instruction set, by a file
// that says how wide its vectors are, how many registers it has and how many of them a tile takes.
#pragma once

#include "masked_conv_lanes.h"

namespace fastvq {
namespace {

constexpr bool kPairs = false;

// Compiled with contraction: a fused multiply-add where the processor has one.
inline Floats multiply_add(float word, Floats vector, Floats sum) { return sum + word * vector; }

}  // namespace
}  // namespace fastvq

#include "masked_conv_body.h"
