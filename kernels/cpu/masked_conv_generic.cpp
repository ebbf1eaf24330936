// Convolutions over live taps in 16-byte vectors, for any processor.
#define FASTVQ_VECTOR_BYTES 16
#define FASTVQ_REGISTERS 16
#define FASTVQ_TILE_VECTORS 2
#include "masked_conv_floats.h"
#include "masked_conv_winograd_body.h"

namespace fastvq {
const ConvKernel masked_conv_generic = kKernel;
const ConvTilesKernel masked_conv_tiles_generic = kTilesKernel;
}  // namespace fastvq
