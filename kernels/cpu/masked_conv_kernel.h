// What the convolutions over live taps compute with: the problem, and one instruction set's part in
// it (masked_conv_*.cpp). Who computes what when is in masked_conv.cpp.
#pragma once

#include <cstdint>

namespace fastvq {

// One live tap.
struct ConvTap {
  int64_t dy, dx;         // the pixel it reads, counted from the output's
  int64_t weight_offset;  // elements from weight[o, c] to the tap's own
  int64_t first, last;    // the input channels it reads: first … last − 1
};

// (B, channels, H, W), strides in elements.
struct ConvImages {
  void* data;
  int64_t stride_b, stride_c, stride_h, stride_w;
};

struct ConvProblem {
  int dtype;  // of x, y, weight and bias (rows.h)
  int64_t B, C, O, H, W;
  ConvImages x;  // C channels
  ConvImages y;  // O channels
  void* weight;
  int64_t stride_o, stride_c;
  const ConvTap* taps;
  int64_t num_taps;
};

// How far the taps reach from a pixel.
struct ConvReach {
  int64_t above, below, left, right;
};

// A block of pixels of one picture.
struct ConvBlock {
  int64_t image, row, rows, column, columns;
};

// Words are float32 numbers, or two bfloat16 numbers for instructions that multiply such pairs: of
// neighbouring channels in `convolve`, of neighbouring pixels in `sum_products`.
//
// Pixels lie as [plane][row][column][kPlane], a plane holding kPlane words of each pixel; weights
// as [output plane][input plane][tap][word][kPlane output channels].
constexpr int64_t kPlane = 64;
constexpr int64_t kMostRows = 64;  // of a block

// One block and where its words lie, for `sum_products`.
struct ConvProducts {
  ConvBlock block;
  float* x;
  float* grad;
};

struct ConvKernel {
  int64_t channels_per_word;  // in `convolve`
  int64_t pixels_per_word;    // in `sum_products`
  int64_t tiles_of_plane;     // jobs of `sum_products` for one tap and pair of planes

  // The words of x that a block's pixels see; `row` is scratch for one row of floats.
  void (*pack_x)(const ConvProblem& problem, const ConvReach& reach, const ConvBlock& block,
                 float* row, float* words);
  // sums[output plane][pixel][kPlane] of a block, from those words and packed weights.
  void (*convolve)(const ConvProblem& problem, const ConvReach& reach, const ConvBlock& block,
                   const float* weight, const float* words, float* sums);
  // y of a block: the sums, the bias and, with `add`, what y holds.
  void (*store)(const ConvProblem& problem, const ConvBlock& block, const float* sums,
                const void* bias, bool add);

  // The words of x and those of y, the output's gradient, that `sum_products` reads.
  void (*pack_seen)(const ConvProblem& problem, const ConvReach& reach, const ConvBlock& block,
                    float* row, float* words);
  void (*pack_gradients)(const ConvProblem& problem, const ConvBlock& block, float* row,
                         float* words);
  // Adds one block's products to the sums of the jobs first … last - 1. Jobs
  // and sums are counted alike: [output plane][input plane][tap], then the tiles_of_plane tiles of
  // input channels, or [kPlane channels][kPlane] sums.
  void (*sum_products)(const ConvProblem& problem, const ConvReach& reach,
                       const ConvProducts& products, int64_t first, int64_t last, float* sums);
  // Adds one block's gradients to bias_sums, of one output plane.
  void (*sum_gradients)(const ConvProblem& problem, const ConvProducts& products, int64_t plane,
                        float* bias_sums);
};

inline int64_t planes_of(int64_t words) { return (words + kPlane - 1) / kPlane; }
inline int64_t words_of(int64_t elements, int64_t per_word) {
  return (elements + per_word - 1) / per_word;
}

// Words of a block and its neighbourhood in one plane.
inline int64_t pitch_of(const ConvReach& reach, const ConvBlock& block) {
  return (reach.left + block.columns + reach.right) * kPlane;
}
inline int64_t plane_of_x(const ConvReach& reach, const ConvBlock& block) {
  return (reach.above + block.rows + reach.below) * pitch_of(reach, block);
}

// Where words pair pixels and a row has an odd number of them, the last stands alone: a second
// set of words holds every pixel of x without its neighbour.
inline int64_t product_sets(const ConvBlock& block, int64_t pixels_per_word) {
  return block.columns % pixels_per_word == 0 ? 1 : 2;
}
inline int64_t plane_of_grad(const ConvBlock& block, int64_t pixels_per_word) {
  return block.rows * words_of(block.columns, pixels_per_word) * kPlane;
}

struct ConvTilesKernel;  // masked_conv_winograd_kernel.h

// What one instruction set offers; of_pairs may be null.
struct ConvKernels {
  const ConvKernel* of_floats;
  const ConvKernel* of_pairs;
  const ConvTilesKernel* of_tiles;
};

extern const ConvKernel masked_conv_generic, masked_conv_avx2, masked_conv_avx512;
extern const ConvTilesKernel masked_conv_tiles_generic, masked_conv_tiles_avx2,
    masked_conv_tiles_avx512;
// Null where the compiler knows no bfloat16 instructions.
extern const ConvKernel* const masked_conv_bf16;

}  // namespace fastvq
