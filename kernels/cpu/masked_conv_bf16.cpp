// Convolutions over live taps of bfloat16 pictures in AVX-512 BF16: each lane adds two products of
// bfloat16 numbers to a float32 sum.
#include "masked_conv_kernel.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>

#define FASTVQ_VECTOR_BYTES 64
#define FASTVQ_REGISTERS 32
#define FASTVQ_TILE_VECTORS 4
#include "masked_conv_lanes.h"

namespace fastvq {
namespace {

constexpr bool kPairs = true;

inline Floats multiply_add(float word, Floats vector, Floats sum) {
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(word), (__m512bh)vector);
}

}  // namespace
}  // namespace fastvq

#include "masked_conv_body.h"

namespace fastvq {
const ConvKernel* const masked_conv_bf16 = &kKernel;
}  // namespace fastvq

#else
namespace fastvq {
const ConvKernel* const masked_conv_bf16 = nullptr;
}  // namespace fastvq
#endif
