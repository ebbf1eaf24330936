// A sequence of codebooks, each on what the last one left.
#pragma once

#include <cstdint>

#include "nearest_code.h"
#include "row_passes.h"

namespace fastvq {

// r = x; for q = 0 … Q-1: indices[n, q] = nearest_code(r[n], codebooks[q]), r[n] -= the code row.
// quantized[n] = the sum of its code rows in that order. r and the sum are float32, rounded once a
// level; quantized is of codebook_dtype. A row without a nearest code at some level gets -1 from
// there on, and NaN. x: (N, D), codebooks: (Q, K, D), contiguous; indices: (N, Q).
void residual_quantize(const NearestCodeKernel& kernel, const RowPasses& passes, const void* x,
                       int x_dtype, const void* codebooks, int codebook_dtype, void* quantized,
                       int64_t* indices, int64_t N, int64_t Q, int64_t K, int64_t D,
                       int num_threads);

}  // namespace fastvq
