// Convolutions over live taps in AVX-512.
#define FASTVQ_VECTOR_BYTES 64
#define FASTVQ_REGISTERS 32
#define FASTVQ_TILE_VECTORS 4
#include "masked_conv_floats.h"
#include "masked_conv_winograd_body.h"

namespace fastvq {
const ConvKernel masked_conv_avx512 = kKernel;
const ConvTilesKernel masked_conv_tiles_avx512 = kTilesKernel;
}  // namespace fastvq
