// Convolutions over a full rectangle of live taps by Winograd's minimal filtering (see
// masked_conv_forms.h): tiles of 2×2 outputs, or of 1×2 where the rectangle has one row. With R × K
// taps an output costs (R + 1)(K + 1)/4 products instead of R·K, the same for the gradient of x and
// for the weight's.
//
// Every output is computed from exactly the pixels that its taps name, in one fixed order. Rounding
// errors are bounded by the sizes of the tile's transformed numbers, not of the output's own terms:
// some two to four times those of plain sums.
#pragma once

#include "masked_conv_kernel.h"

namespace fastvq {

// Whether this can run and pays: float32, a full rectangle of 2 … 5 × 5 neighbouring taps that read
// all channels, and enough of them and of pixels.
bool winograd_runs(const ConvProblem& problem);

// As masked_conv and masked_conv_weight_gradient, of problems that run.
void winograd_conv(const ConvKernels& kernels, const ConvProblem& problem, const float* bias,
                   bool add, int num_threads);
void winograd_weight_gradient(const ConvKernels& kernels, const ConvProblem& problem,
                              int num_threads);

}  // namespace fastvq
