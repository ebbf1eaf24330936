// Convolutions over live taps in 16-byte vectors, for any processor.
#define FASTVQ_VECTOR_BYTES 16
#define FASTVQ_REGISTERS 16
#define FASTVQ_TILE_VECTORS 2
#include "masked_conv_floats.h"

namespace fastvq {
const ConvKernel masked_conv_generic = kKernel;
}  // namespace fastvq
