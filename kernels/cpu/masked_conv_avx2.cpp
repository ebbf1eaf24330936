// Convolutions over live taps in AVX2.
#define FASTVQ_VECTOR_BYTES 32
#define FASTVQ_REGISTERS 16
#define FASTVQ_TILE_VECTORS 2
#include "masked_conv_floats.h"
#include "masked_conv_winograd_body.h"

namespace fastvq {
const ConvKernel masked_conv_avx2 = kKernel;
const ConvTilesKernel masked_conv_tiles_avx2 = kTilesKernel;
}  // namespace fastvq
