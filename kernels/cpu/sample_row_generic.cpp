// sample_row in 16-byte vectors, for any processor.
#define FASTVQ_VECTOR_BYTES 16
#define FASTVQ_TILE_SAMPLES 4
#define FASTVQ_TILE_PANELS 1
#include "sample_row_step.h"

namespace fastvq {
const SampleRowKernel sample_row_generic = draw_samples;
}  // namespace fastvq
