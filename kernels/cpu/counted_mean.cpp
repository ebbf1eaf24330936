// See counted_mean.h.
#include "counted_mean.h"

namespace fastvq {

void counted_mean(const float* losses, const int64_t* indices, int64_t N, int64_t D, float* mean,
                  float* divisor) {
  double total = 0.0;
  int64_t count = 0;
  for (int64_t n = 0; n < N; ++n) {
    if (indices[n] < 0) continue;
    total += losses[n];
    ++count;
  }
  const double elements = count > 0 ? static_cast<double>(count * D) : 1.0;
  *mean = static_cast<float>(total / elements);
  *divisor = static_cast<float>(elements);
}

}  // namespace fastvq
