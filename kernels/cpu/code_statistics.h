// How many rows chose each code, and their sum.
#pragma once

#include <cstdint>

#include "row_passes.h"

namespace fastvq {

// counts[k] = |{n : indices[n] = k}|,  sums[k] = Σ_{n : indices[n] = k} x[n], per book.
// x: (books · N, D) contiguous of x_dtype (rows.h); indices: (books · N,); counts: (books, K);
// sums: (books, K, D). Index -1 is skipped. Each sum is added in float64 in row order and rounded
// to float32 once, so the result does not depend on the number of threads.
// Throws std::invalid_argument for an index outside -1 … K-1 (counts and sums then hold nothing).
void code_statistics(const RowPasses& passes, const void* x, int x_dtype, const int64_t* indices,
                     float* counts, float* sums, int64_t books, int64_t N, int64_t K, int64_t D,
                     int num_threads);

}  // namespace fastvq
