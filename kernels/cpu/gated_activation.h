// The gate of one stack of a gated PixelCNN layer, and its gradient, over rows of pixels:
//
//   y = dropout(tanh(f₁ + a₁) · σ(f₂ + a₂)),   f = features,   a = class bias + mapped
//
// Arithmetic is float32 whatever the dtype; results are rounded to it once.
#pragma once

#include <cstdint>

namespace fastvq {

struct GatedActivation {
  const void* features;    // (B·P, 2C) contiguous, of `dtype` (rows.h)
  const void* class_bias;  // 2C of picture b at b·class_stride elements, or null
  int64_t class_stride;
  const void* mapped;  // 2C of pixel n at n·mapped_stride elements, or null
  int64_t mapped_stride;
  int dtype;
  int64_t B, P, C;  // pictures, pixels of each, channels
  // Dropout: the 32 bits of (n, c) are half c mod 2, low half first, of SplitMix64's output number
  // n·⌈C/2⌉ + c/2 from the state `stream`; the element is kept where they are ≥ threshold.
  uint64_t stream, threshold;  // threshold 0: nothing is dropped
  float scale;                 // of what is kept
};

// Pixels of a picture whose gradients are added up together, in float32.
constexpr int64_t kPixelsPerSum = 128;
inline int64_t sums_per_picture(int64_t P) { return (P + kPixelsPerSum - 1) / kPixelsPerSum; }

struct GatedActivationPasses {
  // gated (·, C) of the pixels first … last − 1.
  void (*forward)(const GatedActivation& call, void* gated, int64_t first, int64_t last);
  // Of the pixels of sums first … last − 1 (sums_per_picture of each picture): grad_features
  // (·, 2C) from grad (·, C); sums (·, 2C), of the unrounded gradients, in pixel order; and the
  // gated features again. grad_features may be the call's features, and gated may be grad.
  void (*backward)(const GatedActivation& call, const void* grad, void* grad_features, float* sums,
                   void* gated, int64_t first, int64_t last);
};

extern const GatedActivationPasses gated_activation_generic, gated_activation_avx2,
    gated_activation_avx512;

void gated_activation(const GatedActivationPasses& passes, const GatedActivation& call, void* gated,
                      int num_threads);
void gated_activation_backward(const GatedActivationPasses& passes, const GatedActivation& call,
                               const void* grad, void* grad_features, float* sums, void* gated,
                               int num_threads);

}  // namespace fastvq
