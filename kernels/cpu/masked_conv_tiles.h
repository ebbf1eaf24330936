// The convolutions' one inner loop, for one instruction set: a tile of P × V·lanes sums in
// registers
//
//   out[p][v] (+)= Σ_segments Σ_k a[k·kStepK + p·kStepP] · b[k·kPlane + v]
//
// a is a word that meets every lane, b a vector of words. In `convolve`, p counts pixels and k
// input channels; in `sum_products`, p counts input channels and k pixels. Included by one file
// each through masked_conv_body.h, which says what that file defines.
#pragma once

#include "masked_conv_kernel.h"

namespace fastvq {
namespace {

// `steps` terms of a tile's sums: of one tap and plane, or of one row of pixels.
struct Segment {
  const float* a;
  const float* b;
  int64_t steps;
};

struct TileCall {
  const Segment* segments;
  int64_t count;
  int64_t a_offset, b_offset;  // of this tile, from the segments' pointers
  float* out;                  // [P][kPlane]
  bool add;
};

template <int P, int V, int64_t kStepP, int64_t kStepK>
__attribute__((noinline)) void sum_tile(const TileCall& call) {
  Floats sums[P][V];
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[p][v] = Floats{};
  }
  for (int64_t i = 0; i < call.count; ++i) {
    const float* a = call.segments[i].a + call.a_offset;
    const float* b = call.segments[i].b + call.b_offset;
#pragma GCC unroll 2
    for (int64_t k = call.segments[i].steps; k > 0; --k, a += kStepK, b += kPlane) {
      Floats vectors[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) vectors[v] = load(b + v * kLanes);
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          sums[p][v] = multiply_add(a[p * kStepP], vectors[v], sums[p][v]);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* out = call.out + p * kPlane + v * kLanes;
      store(out, call.add ? load(out) + sums[p][v] : sums[p][v]);
    }
  }
}

// The most rows of a tile of V vectors that the registers hold, and 12 at most.
constexpr int tile_rows(int V) {
  const int fitting = (kRegisters - V - 2) / V;
  return fitting < 12 ? fitting : 12;
}

template <int V, int P, int64_t kStepP, int64_t kStepK>
void sum_tile_of(int rows, const TileCall& call) {
  if constexpr (P > 1) {
    if (rows < P) return sum_tile_of<V, P - 1, kStepP, kStepK>(rows, call);
  }
  sum_tile<P, V, kStepP, kStepK>(call);
}

// One group of V vectors of columns: `rows` rows in tiles of nearly equal height.
template <int V, int64_t kStepP, int64_t kStepK>
void sum_rows_of_tiles(int64_t rows, const TileCall& call) {
  const int64_t tiles = (rows + tile_rows(V) - 1) / tile_rows(V);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = rows * tile / tiles, last = rows * (tile + 1) / tiles;
    TileCall part = call;
    part.a_offset += first * kStepP;
    part.out += first * kPlane;
    sum_tile_of<V, tile_rows(V), kStepP, kStepK>(static_cast<int>(last - first), part);
  }
}

// `rows` × `columns` ≤ kPlane sums; the lanes beyond `columns` are written too.
template <int64_t kStepP, int64_t kStepK>
void sum_tiles(int64_t rows, int64_t columns, const TileCall& call) {
  TileCall part = call;
  for (int64_t left = (columns + kLanes - 1) / kLanes; left > 0;) {
    const int vectors = left < kTileVectors ? static_cast<int>(left) : kTileVectors;
    if (vectors == 1) sum_rows_of_tiles<1, kStepP, kStepK>(rows, part);
    if (vectors == 2) sum_rows_of_tiles<2, kStepP, kStepK>(rows, part);
    if constexpr (kTileVectors > 2) {
      if (vectors == 3) sum_rows_of_tiles<3, kStepP, kStepK>(rows, part);
      if (vectors == 4) sum_rows_of_tiles<4, kStepP, kStepK>(rows, part);
    }
    part.b_offset += vectors * kLanes;
    part.out += vectors * kLanes;
    left -= vectors;
  }
}

}  // namespace
}  // namespace fastvq
