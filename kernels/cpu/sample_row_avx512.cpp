// sample_row in AVX-512.
#define FASTVQ_VECTOR_BYTES 64
#define FASTVQ_TILE_SAMPLES 4
#define FASTVQ_TILE_PANELS 4
#include "sample_row_step.h"

namespace fastvq {
const SampleRowKernel sample_row_avx512 = draw_samples;
}  // namespace fastvq
