// The convolutions over live taps for one instruction set; included by one file each, which first
// defines, in fastvq's unnamed namespace:
//
//   kLanes, Floats (that many), load, store;
//   kRegisters (vector registers), kTileVectors (of a tile's columns: 2 or 4);
//   multiply_add(word, vector, sum): sum + word · vector, of float32 or of pairs of bfloat16;
//   kPairs: whether words are such pairs.
//
// Everything here has internal linkage, and nothing instantiates a template of the standard
// library: a shared function compiled for these instructions could be the one that other files link
// to.
#pragma once

#include "masked_conv_kernel.h"
#include "masked_conv_pixels.h"
#include "masked_conv_tiles.h"

namespace fastvq {
namespace {

constexpr int64_t kPerWord = kPairs ? 2 : 1;
constexpr int64_t kMostSegments = 2 * kMostRows;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

void pack_x(const ConvProblem& problem, const ConvReach& reach, const ConvBlock& block, float* row,
            float* words) {
  const int64_t pitch = pitch_of(reach, block), step = channels_at_once(problem.x);
  const int64_t first = block.row - reach.above, last = block.row + block.rows + reach.below;
  for (int64_t channel = 0; channel < problem.C; channel += step) {
    const int64_t count = smaller(problem.C - channel, step), word = channel / kPerWord;
    float* to = words + word / kPlane * plane_of_x(reach, block) + word % kPlane;
    for (int64_t i = larger(first, 0); i < smaller(last, problem.H); ++i) {
      const RowPart part = seen_part(problem, reach, block, i);
      float* place = to + (i - first) * pitch;
      read_row(problem.dtype, problem.x, part, channel, count, kPairs ? row : place);
      if (kPairs) pair_channels(row, part.all(), (count + 1) / 2, place);
    }
  }
}

// Taps whose row lies in the picture, from tap `first` on, as segments of one plane; returns how
// many taps were looked at.
inline int64_t tap_segments(const ConvProblem& problem, const ConvReach& reach,
                            const ConvBlock& block, int64_t row, int64_t plane, int64_t first,
                            const float* words, const float* weight, Segment* segments,
                            int64_t* count) {
  const int64_t pitch = pitch_of(reach, block), word = plane * kPlane;
  int64_t tap = first;
  for (*count = 0; tap < problem.num_taps && *count < kMostSegments; ++tap) {
    const ConvTap& live = problem.taps[tap];
    const int64_t begin = larger(live.first / kPerWord, word) - word;
    const int64_t end = smaller(words_of(live.last, kPerWord), word + kPlane) - word;
    const int64_t i = row + live.dy;
    if (i < 0 || i >= problem.H || begin >= end) continue;
    const int64_t place =
        (i - block.row + reach.above) * pitch + (reach.left + live.dx) * kPlane + begin;
    segments[(*count)++] = {words + place, weight + (tap * kPlane + begin) * kPlane, end - begin};
  }
  return tap;
}

void convolve(const ConvProblem& problem, const ConvReach& reach, const ConvBlock& block,
              const float* weight, const float* words, float* sums) {
  const int64_t pixels = block.rows * block.columns;
  const int64_t inputs = larger(planes_of(words_of(problem.C, kPerWord)), 1);
  Segment segments[kMostSegments];
  for (int64_t input = 0; input < inputs; ++input) {
    const float* seen = words + input * plane_of_x(reach, block);
    for (int64_t plane = 0; plane < planes_of(problem.O); ++plane) {
      const float* taps = weight + (plane * inputs + input) * problem.num_taps * kPlane * kPlane;
      const int64_t columns = smaller(problem.O - plane * kPlane, kPlane);
      float* out = sums + plane * pixels * kPlane;
      for (int64_t row = 0; row < block.rows; ++row, out += block.columns * kPlane) {
        int64_t tap = 0, count = 0;
        bool add = input > 0;
        do {
          tap = tap_segments(problem, reach, block, block.row + row, input, tap, seen, taps,
                             segments, &count);
          sum_tiles<kPlane, 1>(block.columns, columns, {segments, count, 0, 0, out, add});
          add = true;
        } while (tap < problem.num_taps);
      }
    }
  }
}

template <class Element>
void store_block(const ConvProblem& problem, const ConvBlock& block, const float* sums,
                 const Element* bias, bool add) {
  const ConvImages& y = problem.y;
  const int64_t step = channels_at_once(y), plane = block.rows * block.columns * kPlane;
  for (int64_t channel = 0; channel < problem.O; channel += step) {
    const int64_t count = smaller(problem.O - channel, step);
    float biases[kPlane] = {};
    if (bias != nullptr) read_elements<Element>(bias, channel, count, biases);
    const float* from = sums + channel / kPlane * plane + channel % kPlane;
    Element* to = static_cast<Element*>(y.data) + block.image * y.stride_b + channel * y.stride_c +
                  block.row * y.stride_h + block.column * y.stride_w;
    for (int64_t row = 0; row < block.rows; ++row) {
      write_pixels(from + row * block.columns * kPlane, biases, y, count, block.columns, add,
                   to + row * y.stride_h);
    }
  }
}

void store_pixels(const ConvProblem& problem, const ConvBlock& block, const float* sums,
                  const void* bias, bool add) {
  if (problem.dtype == kFloat32) {
    store_block(problem, block, sums, static_cast<const float*>(bias), add);
  } else if (problem.dtype == kFloat16) {
    store_block(problem, block, sums, static_cast<const Half*>(bias), add);
  } else {
    store_block(problem, block, sums, static_cast<const BFloat*>(bias), add);
  }
}

// Words of x in products: planes of kPlane channels whatever a word holds, each `sets` times.
void pack_seen(const ConvProblem& problem, const ConvReach& reach, const ConvBlock& block,
               float* row, float* words) {
  const int64_t pitch = pitch_of(reach, block), step = channels_at_once(problem.x);
  const int64_t first = block.row - reach.above, last = block.row + block.rows + reach.below;
  const int64_t set = plane_of_x(reach, block), sets = product_sets(block, kPerWord);
  for (int64_t channel = 0; channel < problem.C; channel += step) {
    const int64_t count = smaller(problem.C - channel, step);
    float* to = words + channel / kPlane * sets * set + channel % kPlane;
    for (int64_t i = larger(first, 0); i < smaller(last, problem.H); ++i) {
      const RowPart part = seen_part(problem, reach, block, i);
      float* place = to + (i - first) * pitch;
      read_row(problem.dtype, problem.x, part, channel, count, kPairs ? row : place);
      if (kPairs) pair_pixels(row, count, part.all(), 1, place);
      if (sets == 2) single_pixels(row, count, part.all(), place + set);
    }
  }
}

void pack_gradients(const ConvProblem& problem, const ConvBlock& block, float* row,
                    float* grad_words) {
  const int64_t step = channels_at_once(problem.y), plane = plane_of_grad(block, kPerWord);
  for (int64_t channel = 0; channel < problem.O; channel += step) {
    const int64_t count = smaller(problem.O - channel, step);
    float* to = grad_words + channel / kPlane * plane + channel % kPlane;
    for (int64_t i = 0; i < block.rows; ++i, to += plane / block.rows) {
      const RowPart part = {block.image, block.row + i, block.column, block.columns, 0, 0};
      read_row(problem.dtype, problem.y, part, channel, count, kPairs ? row : to);
      if (kPairs) pair_pixels(row, count, block.columns, 2, to);
    }
  }
}

// The block's rows that tap reads inside the picture, as segments of pixels.
inline int64_t row_segments(const ConvProblem& problem, const ConvReach& reach,
                            const ConvBlock& block, const ConvTap& tap, const float* words,
                            const float* grad, Segment* segments) {
  const int64_t pitch = pitch_of(reach, block), set = plane_of_x(reach, block);
  const int64_t steps = words_of(block.columns, kPerWord), pairs = block.columns / kPerWord;
  int64_t count = 0;
  for (int64_t row = 0; row < block.rows; ++row) {
    const int64_t i = block.row + row + tap.dy;
    if (i < 0 || i >= problem.H) continue;
    const float* a = words + (i - block.row + reach.above) * pitch + (reach.left + tap.dx) * kPlane;
    const float* b = grad + row * steps * kPlane;
    segments[count++] = {a, b, pairs};
    if (pairs == steps) continue;
    const int64_t lone = block.columns - 1;
    segments[count++] = {a + set + lone * kPlane, b + pairs * kPlane, 1};
  }
  return count;
}

constexpr int64_t kTileChannels = tile_rows(kTileVectors);
constexpr int64_t kTilesOfPlane = (kPlane + kTileChannels - 1) / kTileChannels;

void sum_products(const ConvProblem& problem, const ConvReach& reach, const ConvProducts& products,
                  int64_t first, int64_t last, float* sums) {
  const ConvBlock& block = products.block;
  const int64_t inputs = planes_of(problem.C), sets = product_sets(block, kPerWord);
  Segment segments[kMostSegments];
  int64_t count = 0, of_tap = -1;
  for (int64_t job = first; job < last; ++job) {
    const int64_t tile = job % kTilesOfPlane, tap = job / kTilesOfPlane % problem.num_taps;
    const int64_t planes = job / kTilesOfPlane / problem.num_taps;
    const int64_t input = planes % inputs, plane = planes / inputs;
    const int64_t channels = smaller(problem.C - input * kPlane, kPlane);
    const int64_t tiles = words_of(channels, kTileChannels);
    if (tile >= tiles) continue;
    if (of_tap != job / kTilesOfPlane) {
      of_tap = job / kTilesOfPlane;
      count = row_segments(problem, reach, block, problem.taps[tap],
                           products.x + input * sets * plane_of_x(reach, block),
                           products.grad + plane * plane_of_grad(block, kPerWord), segments);
    }
    const int64_t begin = channels * tile / tiles, end = channels * (tile + 1) / tiles;
    float* out = sums + (of_tap * kPlane + begin) * kPlane;
    sum_tiles<1, kPerWord * kPlane>(end - begin, smaller(problem.O - plane * kPlane, kPlane),
                                    {segments, count, begin, 0, out, true});
  }
}

void sum_gradients(const ConvProblem& problem, const ConvProducts& products, int64_t plane,
                   float* bias_sums) {
  const int64_t pixels = plane_of_grad(products.block, kPerWord) / kPlane;
  const float* grad = products.grad + plane * pixels * kPlane;
  const float one = kPairs ? pair_of(1.0f, 1.0f) : 1.0f;
  const int64_t columns = smaller(problem.O - plane * kPlane, kPlane);
  for (int64_t v = 0; v < columns; v += kLanes) {
    Floats sum = {};
    for (int64_t p = 0; p < pixels; ++p) {
      sum = multiply_add(one, load(grad + p * kPlane + v), sum);
    }
    store(bias_sums + v, load(bias_sums + v) + sum);
  }
}

constexpr ConvKernel kKernel = {kPerWord,     kPerWord,     kTilesOfPlane, pack_x,
                                convolve,     store_pixels, pack_seen,     pack_gradients,
                                sum_products, sum_gradients};

}  // namespace
}  // namespace fastvq
