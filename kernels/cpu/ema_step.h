// Codes that follow their rows by exponential moving averages: one step.
#pragma once

#include <cstdint>

#include "row_passes.h"

namespace fastvq {

// The state of (books, K) codes of D channels, all float32 and contiguous, and how it moves.
struct MovingAverages {
  float* counts;  // N (books, K)
  float* sums;    // m (books, K, D)
  float* codes;   // e (books, K, D), or null: the codes stay
  int64_t books, K, D;
  double decay, eps;
  bool unit;  // codes are brought to length one; a length below 1e-6 counts as 1e-6
};

// N ← N + (1-γ)(n - N),  m ← m + (1-γ)(s - m),  e = m / Ñ,  Ñ[k] = ΣN·(N[k] + ε) / (ΣN + Kε)
// for n[k] rows of sum s[k], n being counts (books, K) and s sums (books, K, D), cut off at 2^125.
// A book without rows stays as it is. Each result is computed in float64 from float32 inputs and
// rounded once, so that it depends on neither the instruction set nor the number of threads.
void ema_step(const MovingAverages& averages, const float* counts, const float* sums,
              int num_threads);

// The same with the statistics of rows x (books · N, D) of x_dtype whose codes are indices, to the
// bit; writes the counts (books, K). averages.codes must not be null. Throws as code_statistics.
void ema_step_of_rows(const RowPasses& passes, const MovingAverages& averages, const void* x,
                      int x_dtype, const int64_t* indices, int64_t N, float* counts,
                      int num_threads);

}  // namespace fastvq
