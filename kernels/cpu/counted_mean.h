// The mean of the losses of the rows that have a code.
#pragma once

#include <cstdint>

namespace fastvq {

// divisor = max(1, D · |{n : indices[n] ≥ 0}|), mean = Σ_{n : indices[n] ≥ 0} losses[n] / divisor,
// added in float64 in row order; both rounded to float32 once.
void counted_mean(const float* losses, const int64_t* indices, int64_t N, int64_t D, float* mean,
                  float* divisor);

}  // namespace fastvq
