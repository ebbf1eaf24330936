// Pictures to words and sums to pictures, for the convolutions over live taps. Included by
// masked_conv_body.h.
#pragma once

#include <string.h>

#include "masked_conv_kernel.h"
#include "rows.h"

namespace fastvq {
namespace {

typedef float Floats4 __attribute__((vector_size(16)));
typedef int32_t Ints4 __attribute__((vector_size(16)));

#if defined(__clang__)
#define FASTVQ_PICK(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define FASTVQ_PICK(a, b, i, j, k, l) __builtin_shuffle(a, b, Ints4{i, j, k, l})
#endif

inline void transpose(Floats4 (&v)[4]) {
  const Floats4 a = FASTVQ_PICK(v[0], v[1], 0, 4, 1, 5), b = FASTVQ_PICK(v[0], v[1], 2, 6, 3, 7);
  const Floats4 c = FASTVQ_PICK(v[2], v[3], 0, 4, 1, 5), d = FASTVQ_PICK(v[2], v[3], 2, 6, 3, 7);
  v[0] = FASTVQ_PICK(a, c, 0, 1, 4, 5);
  v[1] = FASTVQ_PICK(a, c, 2, 3, 6, 7);
  v[2] = FASTVQ_PICK(b, d, 0, 1, 4, 5);
  v[3] = FASTVQ_PICK(b, d, 2, 3, 6, 7);
}

template <class Element>
inline Floats4 load_four(const Element* from) {
  Floats4 four;
  for (int i = 0; i < 4; ++i) four[i] = to_float(from[i]);
  return four;
}
template <>
inline Floats4 load_four<float>(const float* from) {
  Floats4 four;
  memcpy(&four, from, sizeof four);
  return four;
}

// Floats of `count` ≤ kPlane channels of a row's pixels, as [pixel][kPlane], zeros up to the next
// multiple of 16. `from` is the first channel of the first pixel.
template <class Element>
void read_pixels(const Element* from, const ConvImages& images, int64_t count, int64_t pixels,
                 float* to) {
  const int64_t padded = (count + 15) / 16 * 16;
  if (images.stride_c == 1) {
    for (int64_t p = 0; p < pixels; ++p) {
      const Element* source = from + p * images.stride_w;
      for (int64_t c = 0; c < count; ++c) to[p * kPlane + c] = to_float(source[c]);
      for (int64_t c = count; c < padded; ++c) to[p * kPlane + c] = 0.0f;
    }
    return;
  }
  const int64_t square = images.stride_w == 1 ? pixels / 4 * 4 : 0;
  for (int64_t c = 0; c < padded; c += 4) {
    const Element* source = from + c * images.stride_c;
    int64_t p = c + 4 <= count ? square : 0;
    for (int64_t q = 0; q < p; q += 4) {
      Floats4 four[4];
      for (int i = 0; i < 4; ++i) four[i] = load_four(source + i * images.stride_c + q);
      transpose(four);
      for (int i = 0; i < 4; ++i) memcpy(to + (q + i) * kPlane + c, &four[i], sizeof four[i]);
    }
    for (; p < pixels; ++p) {
      for (int64_t i = 0; i < 4; ++i) {
        const bool real = c + i < count;
        to[p * kPlane + c + i] =
            real ? to_float(source[i * images.stride_c + p * images.stride_w]) : 0.0f;
      }
    }
  }
}

// One row of floats, `left` zero pixels before and `right` after the picture's own columns.
struct RowPart {
  int64_t image, row, column, pixels;  // what the picture has
  int64_t left, right;                 // zeros
};

template <class Element>
void read_row(const ConvImages& images, const RowPart& part, int64_t channel, int64_t count,
              float* to) {
  memset(to, 0, static_cast<size_t>(part.left * kPlane) * sizeof *to);
  read_pixels(static_cast<const Element*>(images.data) + part.image * images.stride_b +
                  channel * images.stride_c + part.row * images.stride_h +
                  part.column * images.stride_w,
              images, count, part.pixels, to + part.left * kPlane);
  memset(to + (part.left + part.pixels) * kPlane, 0,
         static_cast<size_t>(part.right * kPlane) * sizeof *to);
}

inline void read_row(int dtype, const ConvImages& images, const RowPart& part, int64_t channel,
                     int64_t count, float* to) {
  if (dtype == kFloat32) return read_row<float>(images, part, channel, count, to);
  if (dtype == kFloat16) return read_row<Half>(images, part, channel, count, to);
  read_row<BFloat>(images, part, channel, count, to);
}

// The part of row `row` that a block and its neighbourhood see.
inline RowPart seen_part(const ConvProblem& problem, const ConvReach& reach, const ConvBlock& block,
                         int64_t row) {
  const int64_t first = block.column - reach.left;
  const int64_t last = block.column + block.columns + reach.right;
  const int64_t inside = first < 0 ? 0 : first < problem.W ? first : problem.W;
  const int64_t end = last > problem.W ? problem.W : last < inside ? inside : last;
  return {block.image, row, inside, end - inside, inside - first, last - end};
}

// Pairs of bfloat16 numbers that floats hold exactly: low and high half of a word.
inline float pair_of(float low, float high) {
  return float_of_bits(bits_of_float(low) >> 16 | (bits_of_float(high) & 0xffff0000u));
}

inline void pair_channels(const float* row, int64_t pixels, int64_t words, float* to) {
  for (int64_t p = 0; p < pixels; ++p) {
    const float* from = row + p * kPlane;
    for (int64_t i = 0; i < words; ++i) {
      to[p * kPlane + i] = pair_of(from[2 * i], from[2 * i + 1]);
    }
  }
}

// to[p] pairs the pixels step·p and its neighbour; beyond `pixels` there are zeros.
inline void pair_pixels(const float* row, int64_t pixels, int64_t step, float* to) {
  for (int64_t p = 0; p < pixels; p += step, to += kPlane) {
    const float* from = row + p * kPlane;
    if (p + 1 < pixels) {
      for (int64_t c = 0; c < kPlane; ++c) to[c] = pair_of(from[c], from[kPlane + c]);
    } else {
      for (int64_t c = 0; c < kPlane; ++c) to[c] = pair_of(from[c], 0.0f);
    }
  }
}

// Pixels without their neighbours.
inline void single_pixels(const float* row, int64_t pixels, float* to) {
  for (int64_t i = 0; i < pixels * kPlane; ++i) to[i] = pair_of(row[i], 0.0f);
}

template <class Element>
inline void store_element(float sum, bool add, Element* to) {
  *to = rounded<Element>(add ? to_float(*to) + sum : sum);
}

// Writes `pixels` pixels of `count` ≤ kPlane channels: the sums [pixel][kPlane] and the bias.
template <class Element>
void write_pixels(const float* sums, const float* bias, const ConvImages& images, int64_t count,
                  int64_t pixels, bool add, Element* to) {
  if (images.stride_c == 1) {
    for (int64_t p = 0; p < pixels; ++p) {
      for (int64_t c = 0; c < count; ++c) {
        store_element(sums[p * kPlane + c] + bias[c], add, to + p * images.stride_w + c);
      }
    }
    return;
  }
  const int64_t square = images.stride_w == 1 ? pixels / 4 * 4 : 0;
  for (int64_t c = 0; c < count; c += 4) {
    const int64_t channels = count - c < 4 ? count - c : 4;
    int64_t p = 0;
    for (; p < square; p += 4) {
      Floats4 four[4];
      for (int i = 0; i < 4; ++i) four[i] = load_four(sums + (p + i) * kPlane + c);
      transpose(four);
      for (int64_t i = 0; i < channels; ++i) {
        const Floats4 sum = four[i] + bias[c + i];
        Element* row = to + (c + i) * images.stride_c + p;
        for (int j = 0; j < 4; ++j) store_element(sum[j], add, row + j);
      }
    }
    for (; p < pixels; ++p) {
      for (int64_t i = 0; i < channels; ++i) {
        store_element(sums[p * kPlane + c + i] + bias[c + i], add,
                      to + (c + i) * images.stride_c + p * images.stride_w);
      }
    }
  }
}

}  // namespace
}  // namespace fastvq
