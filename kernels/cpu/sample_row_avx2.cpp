// sample_row in AVX2 with FMA.
#define FASTVQ_VECTOR_BYTES 32
#define FASTVQ_TILE_SAMPLES 2
#define FASTVQ_TILE_PANELS 2
#include "sample_row_step.h"

namespace fastvq {
const SampleRowKernel sample_row_avx2 = draw_samples;
}  // namespace fastvq
