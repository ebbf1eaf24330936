// Convolution over live taps that are given as data: mask types A and B, the rectangle of a
// vertical stack, channel-causal masks and (with H = 1) causal sequences are one kernel. What no
// tap names is never loaded, multiplied or written.
//
// A thread owns a block of pixels: it copies their neighbourhood, with zeros beyond the picture, as
// words [channel][pixel] that stay in its L2 cache, and sums tiles of pixels × output channels in
// registers over all live taps. Nothing of size taps × pixels is written.
//
// Every output is one fixed order of additions, whatever the number of threads.
#pragma once

#include <cstdint>

#include "masked_conv_kernel.h"

namespace fastvq {

//   y[b, o, i, j] = bias[o] + Σ_tap Σ_{first ≤ c < last} weight[o, c, tap] · x[b, c, i + dy, j +
//   dx]
//
// with zeros beyond the picture. `bias` may be null. `add`: adds to what y holds. The gradient of x
// is this call with the gradient of y for x, the weight's strides exchanged and dy, dx negated.
// `winograd`: with fewer products, where masked_conv_winograd.h can and it pays; errors are then
// those of its sums.
void masked_conv(const ConvKernels& kernels, ConvProblem problem, const void* bias, bool add,
                 bool winograd, int num_threads);

// weight[o, c, tap] = Σ_{b, i, j} y[b, o, i, j] · x[b, c, i + dy, j + dx] for the live taps alone,
// y being the gradient of the output; grad_bias[o] = Σ y, unless it is null. Taps that reach beyond
// the picture from every pixel are left alone too: hand in zeros.
// `winograd` as above, where grad_bias is null.
void masked_conv_weight_gradient(const ConvKernels& kernels, ConvProblem problem, void* grad_bias,
                                 bool winograd, int num_threads);

}  // namespace fastvq
