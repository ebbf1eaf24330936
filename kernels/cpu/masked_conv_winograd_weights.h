// The weights' transform of the filtered convolutions and its transpose, in float64, rounded once.
// Included by masked_conv_winograd_body.h.
#pragma once

#include "masked_conv_winograd_kernel.h"

namespace fastvq {
namespace {

// Numbers of one input channel and the output channels of one plane, by rows and columns.
using Weights = double[kMostFormPoints][kMostFormPoints][kPlane];

inline void add_scaled(double factor, const double* from, double* to) {
  if (factor == 0.0) return;
  for (int64_t o = 0; o < kPlane; ++o) to[o] += factor * from[o];
}

// Calls body(o, row, column, the weight) for every live weight of the plane's output channels.
template <class Body>
void over_weights(const ConvProblem& problem, const ConvTiling& tiling, int64_t plane, int64_t c,
                  const Body& body) {
  for (int64_t o = 0; o < smaller(problem.O - plane * kPlane, kPlane); ++o) {
    float* const of_channels = static_cast<float*>(problem.weight) +
                               (plane * kPlane + o) * problem.stride_o + c * problem.stride_c;
    for (int64_t t = 0; t < problem.num_taps; ++t) {
      const ConvTap& tap = problem.taps[t];
      body(o, tap.dy - tiling.dy, tap.dx - tiling.dx, of_channels[tap.weight_offset]);
    }
  }
}

// Where column point 0 of a row point, output plane and input channel lies; the next point is
// planes_of(C) planes on.
inline int64_t place_of_weight(const ConvProblem& problem, const ConvTiling& tiling, int point,
                               int64_t plane, int64_t c) {
  const int64_t before = (point * planes_of(problem.O) + plane) * tiling.columns().points;
  return (before * planes_of(problem.C) + c / kPlane) * kPlane * kPlane + c % kPlane * kPlane;
}

void pack_tile_weight(const ConvProblem& problem, const ConvTiling& tiling, int64_t plane,
                      int64_t c, float* packed) {
  const ConvForm &rows = tiling.rows(), &columns = tiling.columns();
  Weights taps = {};
  over_weights(problem, tiling, plane, c,
               [&](int64_t o, int64_t u, int64_t v, float& weight) { taps[u][v][o] = weight; });
  for (int p = 0; p < rows.points; ++p) {
    double half[kMostFormTaps][kPlane] = {};
    for (int u = 0; u < rows.taps; ++u) {
      for (int v = 0; v < columns.taps; ++v) add_scaled(rows.weight[p][u], taps[u][v], half[v]);
    }
    float* to = packed + place_of_weight(problem, tiling, p, plane, c);
    for (int q = 0; q < columns.points; ++q, to += planes_of(problem.C) * kPlane * kPlane) {
      double whole[kPlane] = {};
      for (int v = 0; v < columns.taps; ++v) add_scaled(columns.weight[q][v], half[v], whole);
      for (int64_t o = 0; o < kPlane; ++o) to[o] = static_cast<float>(whole[o]);
    }
  }
}

void store_tile_weight(const ConvProblem& problem, const ConvTiling& tiling, int64_t plane,
                       int64_t c, int64_t slices, const float* sums) {
  const ConvForm &rows = tiling.rows(), &columns = tiling.columns();
  const int64_t of_slice = place_of_weight(problem, tiling, rows.points, 0, 0);
  Weights taps = {};
  for (int p = 0; p < rows.points; ++p) {
    double half[kMostFormTaps][kPlane] = {};
    const float* from = sums + place_of_weight(problem, tiling, p, plane, c);
    for (int q = 0; q < columns.points; ++q, from += planes_of(problem.C) * kPlane * kPlane) {
      double whole[kPlane] = {};
      for (int64_t slice = 0; slice < slices; ++slice) {
        for (int64_t o = 0; o < kPlane; ++o) whole[o] += from[slice * of_slice + o];
      }
      for (int v = 0; v < columns.taps; ++v) add_scaled(columns.weight[q][v], whole, half[v]);
    }
    for (int u = 0; u < rows.taps; ++u) {
      for (int v = 0; v < columns.taps; ++v) add_scaled(rows.weight[p][u], half[v], taps[u][v]);
    }
  }
  over_weights(problem, tiling, plane, c, [&](int64_t o, int64_t u, int64_t v, float& weight) {
    weight = static_cast<float>(taps[u][v][o]);
  });
}

}  // namespace
}  // namespace fastvq
