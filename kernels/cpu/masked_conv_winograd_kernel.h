// One instruction set's part in the filtered convolutions (masked_conv_winograd.cpp), and the
// layout of what it reads and writes. Words, planes and sums are those of masked_conv_kernel.h.
#pragma once

#include "masked_conv_forms.h"
#include "masked_conv_kernel.h"

namespace fastvq {

// A block of a picture that is whole tiles from its first pixel on; the last ones may overhang.
struct ConvTiles {
  ConvBlock block;
  int64_t rows, columns;  // of tiles
  int64_t count() const { return rows * columns; }
};

// Scratch of one worker; [..] as the sizes of the largest block need.
struct ConvTileScratch {
  float* seen;      // x of a block and its neighbourhood, [plane][row][column][kPlane]
  float* grad;      // for the weight gradient, the block's y likewise, some output planes of it
  float* points;    // of one row point, [column point][plane][tile][kPlane] of `seen` …
  float* grads;     // … and [output plane][column point][tile][kPlane] of `grad`
  float* products;  // of one row point and output plane, [column point][tile][kPlane]
};

struct ConvTilesKernel {
  // The weights of input channel c and the output channels of one plane, in the layout below.
  void (*pack_weight)(const ConvProblem& problem, const ConvTiling& tiling, int64_t plane,
                      int64_t c, float* packed);
  // sums[output plane][pixel][kPlane] of a block, from weights [row point][output plane]
  // [column point][input plane][word][kPlane output channels].
  void (*convolve)(const ConvProblem& problem, const ConvTiling& tiling, const ConvTiles& tiles,
                   const float* weight, const ConvTileScratch& scratch, float* sums);
  // Sums of a block's products, in the weight's layout, of the output planes first … last − 1;
  // `add`: onto what `sums` holds.
  void (*sum_products)(const ConvProblem& problem, const ConvTiling& tiling, const ConvTiles& tiles,
                       int64_t first, int64_t last, bool add, const ConvTileScratch& scratch,
                       float* sums);
  // The transpose of pack_weight, from `slices` such sums.
  void (*store_weight)(const ConvProblem& problem, const ConvTiling& tiling, int64_t plane,
                       int64_t c, int64_t slices, const float* sums);
};

// Pixels of an edge that the outputs of `tiles` tiles see.
inline int64_t window_of(const ConvForm& form, int64_t tiles) {
  return form.outputs * tiles + form.taps - 1;
}
inline int64_t floats_seen(const ConvTiling& tiling, const ConvTiles& tiles) {
  return window_of(tiling.rows(), tiles.rows) * window_of(tiling.columns(), tiles.columns) * kPlane;
}
inline int64_t floats_covered(const ConvTiling& tiling, const ConvTiles& tiles) {
  return tiling.rows().outputs * tiling.columns().outputs * tiles.count() * kPlane;
}

}  // namespace fastvq
