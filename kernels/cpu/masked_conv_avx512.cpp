// Convolutions over live taps in AVX-512.
#define FASTVQ_VECTOR_BYTES 64
#define FASTVQ_REGISTERS 32
#define FASTVQ_TILE_VECTORS 4
#include "masked_conv_floats.h"

namespace fastvq {
const ConvKernel masked_conv_avx512 = kKernel;
}  // namespace fastvq
