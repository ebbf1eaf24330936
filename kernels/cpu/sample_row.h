// Sampling one row of codes from a gated PixelCNN whose rows above are known: the horizontal stack,
// attention, the head and the draw, column after column, without returning to Python.
//
// What a row owes to the rows above (the vertical stack, the link, class and map) arrives as
// `terms`, one per layer. Buffers and weights belong to the caller (fastvq/sampling/cpu_rows.py).
#pragma once

#include <cstdint>

#include "draw_code.h"

namespace fastvq {

// Output channels of a packed matrix that lie together: (out, in) weights are stored as
// (⌈out / 16⌉, in, 16), zero beyond `out`.
constexpr int64_t kPanel = 16;

// One layer as int64 fields: addresses of float32 tensors, and sizes. C channels, W columns,
// n samples, P = H·W positions.
struct SampleRowLayer {
  enum Kind : int64_t { kGated = 0, kAttention = 1 };
  int64_t kind;
  const float* weight;      // gated: packed (2C, taps·C), inputs by (tap, channel);
                            // attention: packed (3C, C), queries, keys, values
  const float* out_weight;  // packed (C, C)
  const float* out_bias;    // (C,)
  const float* terms;       // gated: (W, n, 2C), of this row; attention: (P, 3C)
  float* inputs;            // gated: (n, reach + W, C), this row's, zero before the first column
  float* keys;              // attention: (n, heads, C / heads, P)
  float* values;            // attention: (n, heads, P, C / heads)
  int64_t taps, dilation, reach, residual;  // gated
  int64_t heads;                            // attention
};

struct SampleRowProblem {
  const SampleRowLayer* layers;
  int64_t num_layers;
  const float* embedding;                    // (K, C)
  const float *hidden_weight, *hidden_bias;  // packed (M, C), (M,)
  const float *logit_weight, *logit_bias;    // packed (K, M), (K,)
  int64_t* codes;                            // (n, H, W); −1 where still to be drawn
  float* logits;                             // (n, K), of the column where a sample stopped
  uint8_t* doubtful;                         // (n,), written by each call
  int64_t n, channels, hidden, K, H, W, row;
  int64_t position;              // of the row's first code in the noise
  const int64_t* noise_samples;  // (n,), the samples' indices in the noise
  DrawRule rule;
};

// One thread's memory, for its samples.
struct SampleRowScratch {
  float* product;   // (samples, wide)
  float* features;  // (samples, max(C, M))
  float* hidden;    // (samples, max(C, M))
  float* scores;    // (P,)
  int64_t wide;     // the widest product, in whole panels
};

// Draws samples first … last − 1 from column `start` on. Returns W, or the column at which at least
// one of them is in doubt: its `doubtful` is set, its code left at −1, the others' are drawn.
using SampleRowKernel = int64_t (*)(const SampleRowProblem& problem,
                                    const SampleRowScratch& scratch, CodeDrawer& drawer,
                                    int64_t first, int64_t last, int64_t start);

extern const SampleRowKernel sample_row_generic;
#if defined(__x86_64__)
extern const SampleRowKernel sample_row_avx2, sample_row_avx512;
#endif

// All samples, in `blocks` equal ranges with a thread each; columns[b] holds each range's next
// column and is moved on. A sample's codes do not depend on the ranges.
void sample_row(SampleRowKernel kernel, const SampleRowProblem& problem, int64_t* columns,
                int64_t blocks);

}  // namespace fastvq
