// The filtered convolutions for one instruction set, in float32; included after
// masked_conv_floats.h, whose loops sum the products.
//
// A block's rows are combined for one row point at a time, their columns for all column points, so
// that points, products and sums stay in the L2 cache beside the words they come from.
#pragma once

#include "lanes.h"
#include "masked_conv_winograd_kernel.h"
#include "masked_conv_winograd_weights.h"

namespace fastvq {
namespace {

enum class Matrix { kData, kGradients, kResult };

// Entry (i, k) of what a transform multiplies k inputs with; gradients take the result's transpose.
template <Matrix kMatrix, int kTaps>
constexpr float entry(int i, int k) {
  constexpr const ConvForm& form = kConvForms[kTaps];
  return static_cast<float>(kMatrix == Matrix::kData     ? form.data[i][k]
                            : kMatrix == Matrix::kResult ? form.result[i][k]
                                                         : form.result[k][i]);
}
template <Matrix kMatrix, int kTaps>
constexpr int kInputs =
    kMatrix == Matrix::kGradients ? kConvForms[kTaps].outputs : kConvForms[kTaps].points;

// Σ_k entry(i, k) in[k] from k on; what has entry 0 is not touched.
template <Matrix kMatrix, int kTaps, int i, int k = 0, bool kStarted = false>
FASTVQ_INLINE Floats dot(const Floats* in, Floats sum = Floats{}) {
  if constexpr (k == kInputs<kMatrix, kTaps>) {
    return sum;
  } else {
    constexpr float factor = entry<kMatrix, kTaps>(i, k);
    if constexpr (factor == 0.0f) {
      return dot<kMatrix, kTaps, i, k + 1, kStarted>(in, sum);
    } else {
      Floats next = in[k];
      if constexpr (factor == -1.0f) {
        next = kStarted ? sum - next : -next;
      } else if constexpr (factor == 1.0f) {
        next = kStarted ? sum + next : next;
      } else {
        next = kStarted ? sum + next * factor : next * factor;
      }
      return dot<kMatrix, kTaps, i, k + 1, true>(in, next);
    }
  }
}

// put(i, Σ_k entry(i, k) in[k]) for all kCount outputs i.
template <Matrix kMatrix, int kTaps, int kCount, int i = 0, class Put>
FASTVQ_INLINE void transform(const Floats* in, const Put& put) {
  if constexpr (i < kCount) {
    put(i, dot<kMatrix, kTaps, i>(in));
    transform<kMatrix, kTaps, kCount, i + 1>(in, put);
  }
}

// What one row point takes from the rows of a tile.
struct RowTerms {
  int count;
  int64_t offset[kMostFormPoints];
  float factor[kMostFormPoints];
};

template <Matrix kMatrix>
RowTerms row_terms(const ConvForm& form, int point, int64_t pitch) {
  RowTerms terms = {0, {}, {}};
  const int inputs = kMatrix == Matrix::kData ? form.points : form.outputs;
  for (int k = 0; k < inputs; ++k) {
    const double factor = kMatrix == Matrix::kData ? form.data[point][k] : form.result[k][point];
    if (factor == 0.0) continue;
    terms.offset[terms.count] = k * pitch;
    terms.factor[terms.count++] = static_cast<float>(factor);
  }
  return terms;
}

FASTVQ_INLINE Floats combined(const RowTerms& terms, const float* from) {
  Floats sum = load(from + terms.offset[0]) * terms.factor[0];
  for (int e = 1; e < terms.count; ++e) sum += load(from + terms.offset[e]) * terms.factor[e];
  return sum;
}

struct PointsCall {
  ConvTiles tiles;
  RowTerms terms;
  int64_t pitch, row_step;  // of the rows read, and from a tile's first to the next one's
  int64_t lanes;            // channels
  int64_t point_step;       // of what is written
};

// All column points of one plane.
template <Matrix kMatrix, int kTaps>
void write_points(const PointsCall& call, const float* from, float* to) {
  constexpr ConvForm form = kConvForms[kTaps];
  constexpr int inputs = kInputs<kMatrix, kTaps>, kept = inputs - form.outputs;
  for (int64_t row = 0; row < call.tiles.rows; ++row) {
    for (int64_t v = 0; v < call.lanes; v += kLanes) {
      const float* place = from + row * call.row_step + v;
      float* out = to + row * call.tiles.columns * kPlane + v;
      Floats in[inputs];
#pragma GCC unroll 8
      for (int k = 0; k < kept; ++k, place += kPlane) in[k] = combined(call.terms, place);
      for (int64_t t = 0; t < call.tiles.columns; ++t, out += kPlane) {
#pragma GCC unroll 8
        for (int k = kept; k < inputs; ++k, place += kPlane) in[k] = combined(call.terms, place);
        transform<kMatrix, kTaps, form.points>(
            in, [&](int q, Floats value) { store(out + q * call.point_step, value); });
#pragma GCC unroll 8
        for (int k = 0; k < kept; ++k) in[k] = in[k + form.outputs];
      }
    }
  }
}

template <Matrix kMatrix>
void write_points(int taps, const PointsCall& call, const float* from, float* to) {
  if (taps == 1) write_points<kMatrix, 1>(call, from, to);
  if (taps == 2) write_points<kMatrix, 2>(call, from, to);
  if (taps == 3) write_points<kMatrix, 3>(call, from, to);
  if (taps == 4) write_points<kMatrix, 4>(call, from, to);
  if (taps == 5) write_points<kMatrix, 5>(call, from, to);
}

// One row of outputs of a tile and its share of a row point.
struct RowTarget {
  float factor;
  bool first;  // nothing is there yet
};

template <int kTaps>
void add_products(const ConvTiles& tiles, const float* products, int64_t lanes, int row_outputs,
                  const RowTarget* targets, float* sums) {
  constexpr ConvForm form = kConvForms[kTaps];
  const ConvBlock& block = tiles.block;
  for (int64_t tile = 0; tile < tiles.count(); ++tile, products += kPlane) {
    const int64_t row = tile / tiles.columns * row_outputs;
    const int64_t column = tile % tiles.columns * form.outputs;
    const bool whole = column + form.outputs <= block.columns;
    float* place = sums + (row * block.columns + column) * kPlane;
    for (int64_t v = 0; v < lanes; v += kLanes) {
      Floats in[form.points], values[form.outputs];
#pragma GCC unroll 8
      for (int q = 0; q < form.points; ++q) in[q] = load(products + q * tiles.count() * kPlane + v);
      transform<Matrix::kResult, kTaps, form.outputs>(
          in, [&](int j, Floats value) { values[j] = value; });
      for (int r = 0; r < row_outputs && row + r < block.rows; ++r) {
        if (targets[r].factor == 0.0f) continue;
        float* to = place + r * block.columns * kPlane + v;
#pragma GCC unroll 2
        for (int j = 0; j < form.outputs; ++j, to += kPlane) {
          if (j > 0 && !whole) break;
          const Floats value = values[j] * targets[r].factor;
          store(to, targets[r].first ? value : load(to) + value);
        }
      }
    }
  }
}

void add_products(const ConvTiling& tiling, const ConvTiles& tiles, int point,
                  const float* products, int64_t lanes, float* sums) {
  const ConvForm& form = tiling.rows();
  RowTarget targets[2] = {};
  for (int r = 0; r < form.outputs; ++r) {
    bool first = true;
    for (int p = 0; p < point; ++p) first = first && form.result[r][p] == 0.0;
    targets[r] = {static_cast<float>(form.result[r][point]), first};
  }
  const int taps = tiling.column_taps, outputs = form.outputs;
  if (taps == 1) add_products<1>(tiles, products, lanes, outputs, targets, sums);
  if (taps == 2) add_products<2>(tiles, products, lanes, outputs, targets, sums);
  if (taps == 3) add_products<3>(tiles, products, lanes, outputs, targets, sums);
  if (taps == 4) add_products<4>(tiles, products, lanes, outputs, targets, sums);
  if (taps == 5) add_products<5>(tiles, products, lanes, outputs, targets, sums);
}

// A rectangle of a picture, zero from row_end and column_end on.
struct Window {
  int64_t image, row, rows, column, columns, row_end, column_end;
};

// Its words as [plane][row][column][kPlane], with zeros beyond the picture.
void pack_window(const ConvImages& images, int64_t channels, const Window& window, float* words) {
  const int64_t step = channels_at_once(images), pitch = window.columns * kPlane;
  const int64_t left = smaller(larger(-window.column, 0), window.columns);
  const int64_t end = larger(smaller(window.columns, window.column_end - window.column), left);
  for (int64_t channel = 0; channel < channels; channel += step) {
    const int64_t count = smaller(channels - channel, step);
    float* to = words + channel / kPlane * window.rows * pitch + channel % kPlane;
    for (int64_t i = 0; i < window.rows; ++i, to += pitch) {
      const int64_t row = window.row + i;
      if (row < 0 || row >= window.row_end) {
        zero_pixels(count, window.columns, to);
        continue;
      }
      read_row<float>(
          images, {window.image, row, window.column + left, end - left, left, window.columns - end},
          channel, count, to);
    }
  }
}

// What lies beyond the last output's view is left out: an overhanging tile does not see it either.
void pack_seen_window(const ConvProblem& problem, const ConvTiling& tiling, const ConvTiles& tiles,
                      float* words) {
  const int64_t below = tiling.dy + tiling.row_taps - 1, right = tiling.dx + tiling.column_taps - 1;
  pack_window(problem.x, problem.C,
              {tiles.block.image, tiles.block.row + tiling.dy, window_of(tiling.rows(), tiles.rows),
               tiles.block.column + tiling.dx, window_of(tiling.columns(), tiles.columns),
               problem.H + smaller(below, 0), problem.W + smaller(right, 0)},
              words);
}

// Row point p of all column points of x: [column point][plane][tile][kPlane].
void write_seen_points(const ConvProblem& problem, const ConvTiling& tiling, const ConvTiles& tiles,
                       int point, const ConvTileScratch& scratch) {
  const int64_t pitch = window_of(tiling.columns(), tiles.columns) * kPlane;
  const int64_t planes = planes_of(problem.C), of_plane = tiles.count() * kPlane;
  PointsCall call = {tiles, row_terms<Matrix::kData>(tiling.rows(), point, pitch),
                     pitch, tiling.rows().outputs * pitch,
                     0,     planes * of_plane};
  for (int64_t plane = 0; plane < planes; ++plane) {
    call.lanes = smaller(problem.C - plane * kPlane, kPlane);
    write_points<Matrix::kData>(tiling.column_taps, call,
                                scratch.seen + plane * floats_seen(tiling, tiles),
                                scratch.points + plane * of_plane);
  }
}

void convolve_tiles(const ConvProblem& problem, const ConvTiling& tiling, const ConvTiles& tiles,
                    const float* weight, const ConvTileScratch& scratch, float* sums) {
  const int64_t inputs = planes_of(problem.C), outputs = planes_of(problem.O);
  const int64_t of_plane = tiles.count() * kPlane, points = tiling.columns().points;
  const int64_t pixels = tiles.block.rows * tiles.block.columns;
  Segment segments[kMostSegments];
  pack_seen_window(problem, tiling, tiles, scratch.seen);
  for (int p = 0; p < tiling.rows().points; ++p) {
    write_seen_points(problem, tiling, tiles, p, scratch);
    for (int64_t plane = 0; plane < outputs; ++plane) {
      const int64_t lanes = smaller(problem.O - plane * kPlane, kPlane);
      for (int64_t q = 0; q < points; ++q) {
        float* out = scratch.products + q * of_plane;
        for (int64_t input = 0; input < inputs; input += kMostSegments) {
          int64_t count = 0;
          for (; count < smaller(inputs - input, kMostSegments); ++count) {
            const int64_t at = q * inputs + input + count;
            segments[count] = {
                scratch.points + at * of_plane,
                weight + ((p * outputs + plane) * points * inputs + at) * kPlane * kPlane,
                smaller(problem.C - (input + count) * kPlane, kPlane)};
          }
          sum_tiles<kPlane, 1>(tiles.count(), lanes, {segments, count, 0, 0, out, input > 0});
        }
      }
      add_products(tiling, tiles, p, scratch.products, lanes, sums + plane * pixels * kPlane);
    }
  }
}

void sum_tile_products(const ConvProblem& problem, const ConvTiling& tiling, const ConvTiles& tiles,
                       int64_t first, int64_t last, bool add, const ConvTileScratch& scratch,
                       float* sums) {
  const int64_t inputs = planes_of(problem.C), outputs = planes_of(problem.O);
  const int64_t of_plane = tiles.count() * kPlane, points = tiling.columns().points;
  const int64_t channels = smaller(problem.O, last * kPlane) - first * kPlane;
  const int64_t row_outputs = tiling.rows().outputs;
  const int64_t columns = tiling.columns().outputs * tiles.columns, pitch = columns * kPlane;
  ConvImages grads = problem.y;
  grads.data = static_cast<float*>(grads.data) + first * kPlane * grads.stride_c;
  pack_seen_window(problem, tiling, tiles, scratch.seen);
  pack_window(grads, channels,
              {tiles.block.image, tiles.block.row, row_outputs * tiles.rows, tiles.block.column,
               columns, problem.H, problem.W},
              scratch.grad);
  for (int p = 0; p < tiling.rows().points; ++p) {
    write_seen_points(problem, tiling, tiles, p, scratch);
    PointsCall call = {tiles, row_terms<Matrix::kGradients>(tiling.rows(), p, pitch),
                       pitch, row_outputs * pitch,
                       0,     of_plane};
    for (int64_t plane = first; plane < last; ++plane) {
      call.lanes = smaller(problem.O - plane * kPlane, kPlane);
      write_points<Matrix::kGradients>(
          tiling.column_taps, call, scratch.grad + (plane - first) * floats_covered(tiling, tiles),
          scratch.grads);
      for (int64_t at = 0; at < points * inputs; ++at) {
        const Segment segment = {scratch.points + at * of_plane,
                                 scratch.grads + at / inputs * of_plane, tiles.count()};
        float* out = sums + ((p * outputs + plane) * points * inputs + at) * kPlane * kPlane;
        sum_tiles<1, kPlane>(smaller(problem.C - at % inputs * kPlane, kPlane), call.lanes,
                             {&segment, 1, 0, 0, out, add});
      }
    }
  }
}

constexpr ConvTilesKernel kTilesKernel = {pack_tile_weight, convolve_tiles, sum_tile_products,
                                          store_tile_weight};

}  // namespace
}  // namespace fastvq
