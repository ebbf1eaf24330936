// Convolutions over live taps in AVX2.
#define FASTVQ_VECTOR_BYTES 32
#define FASTVQ_REGISTERS 16
#define FASTVQ_TILE_VECTORS 2
#include "masked_conv_lanes.h"

namespace fastvq {
namespace {

constexpr bool kPairs = false;

// Compiled with contraction: a fused multiply-add where the processor has one.
inline Floats multiply_add(float word, Floats vector, Floats sum) { return sum + word * vector; }

}  // namespace
}  // namespace fastvq

#include "masked_conv_body.h"

namespace fastvq {
const ConvKernel masked_conv_avx2 = kKernel;
}  // namespace fastvq
