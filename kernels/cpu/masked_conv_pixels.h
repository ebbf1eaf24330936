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

constexpr int64_t kSquare = 16;

// to[i][j] = from[j][i], both with rows `stride_from` and `stride_to` apart.
inline void transpose_square(const float* from, int64_t stride_from, float* to, int64_t stride_to) {
  for (int64_t i = 0; i < kSquare; i += 4) {
    for (int64_t j = 0; j < kSquare; j += 4) {
      Floats4 four[4];
      for (int k = 0; k < 4; ++k)
        memcpy(&four[k], from + (j + k) * stride_from + i, sizeof four[k]);
      transpose(four);
      for (int k = 0; k < 4; ++k) memcpy(to + (i + k) * stride_to + j, &four[k], sizeof four[k]);
    }
  }
}

// Elements `stride` apart as floats. GCC 12 turns a loop of constant length into scalar code.
template <class Element>
inline void read_strided(const Element* from, int64_t stride, int64_t count, float* to) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
    return;
  }
  for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i * stride]);
}

inline int64_t part_of_square(int64_t all, int64_t done) {
  return all - done < kSquare ? all - done : kSquare;
}

// How many channels of all a block's pixels are best read or written together: what lies together.
inline int64_t channels_at_once(const ConvImages& images) {
  return images.stride_c == 1 ? kPlane : kSquare;
}

// Floats of `count` channels of a row's pixels as [pixel][kPlane], with zeros up to the next
// multiple of kSquare. `from` is the first channel of the first pixel.
template <class Element>
void read_pixels(const Element* from, const ConvImages& images, int64_t count, int64_t pixels,
                 float* to) {
  if (images.stride_c == 1) {
    const int64_t padded = (count + kSquare - 1) / kSquare * kSquare;
    for (int64_t p = 0; p < pixels; ++p) {
      float* place = to + p * kPlane;
      read_strided(from + p * images.stride_w, 1, count, place);
      for (int64_t c = count; c < padded; ++c) place[c] = 0.0f;
    }
    return;
  }
  for (int64_t c = 0; c < count; c += kSquare) {
    const int64_t channels = part_of_square(count, c);
    for (int64_t p = 0; p < pixels; p += kSquare) {
      const int64_t columns = part_of_square(pixels, p);
      const Element* source = from + c * images.stride_c + p * images.stride_w;
      float* place = to + p * kPlane + c;
      if constexpr (sizeof(Element) == sizeof(float)) {
        if (channels == kSquare && columns == kSquare && images.stride_w == 1) {
          transpose_square(source, images.stride_c, place, kPlane);
          continue;
        }
      }
      float square[kSquare * kSquare] = {}, turned[kSquare * kSquare];
      for (int64_t i = 0; i < channels; ++i) {
        read_strided(source + i * images.stride_c, images.stride_w, columns, square + i * kSquare);
      }
      if (columns == kSquare) {
        transpose_square(square, kSquare, place, kPlane);
        continue;
      }
      transpose_square(square, kSquare, turned, kSquare);
      for (int64_t i = 0; i < columns; ++i) {
        memcpy(place + i * kPlane, turned + i * kSquare, kSquare * sizeof *place);
      }
    }
  }
}

// One row of floats, `left` zero pixels before and `right` after the picture's own columns.
struct RowPart {
  int64_t image, row, column, pixels;  // what the picture has
  int64_t left, right;                 // zeros
  int64_t all() const { return left + pixels + right; }
};

inline void zero_pixels(int64_t count, int64_t pixels, float* to) {
  const int64_t padded = (count + kSquare - 1) / kSquare * kSquare;
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t c = 0; c < padded; ++c) to[p * kPlane + c] = 0.0f;
  }
}

template <class Element>
void read_row(const ConvImages& images, const RowPart& part, int64_t channel, int64_t count,
              float* to) {
  zero_pixels(count, part.left, to);
  read_pixels(static_cast<const Element*>(images.data) + part.image * images.stride_b +
                  channel * images.stride_c + part.row * images.stride_h +
                  part.column * images.stride_w,
              images, count, part.pixels, to + part.left * kPlane);
  zero_pixels(count, part.right, to + (part.left + part.pixels) * kPlane);
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

// to[p] pairs the pixels step·p and its neighbour, of `count` channels; beyond `pixels` there are
// zeros.
inline void pair_pixels(const float* row, int64_t count, int64_t pixels, int64_t step, float* to) {
  const int64_t padded = (count + kSquare - 1) / kSquare * kSquare;
  for (int64_t p = 0; p < pixels; p += step, to += kPlane) {
    const float* from = row + p * kPlane;
    if (p + 1 < pixels) {
      for (int64_t c = 0; c < padded; ++c) to[c] = pair_of(from[c], from[kPlane + c]);
    } else {
      for (int64_t c = 0; c < padded; ++c) to[c] = pair_of(from[c], 0.0f);
    }
  }
}

// Pixels without their neighbours.
inline void single_pixels(const float* row, int64_t count, int64_t pixels, float* to) {
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t c = 0; c < count; ++c) to[p * kPlane + c] = pair_of(row[p * kPlane + c], 0.0f);
  }
}

// Rounds sums and biases to elements `stride` apart.
template <class Element>
inline void write_strided(const float* sums, const float* bias, bool add, int64_t count,
                          int64_t stride, Element* to) {
  if (stride == 1 && !add) {
    for (int64_t i = 0; i < count; ++i) to[i] = rounded<Element>(sums[i] + bias[i]);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    Element& element = to[i * stride];
    const float sum = sums[i] + bias[i];
    element = rounded<Element>(add ? to_float(element) + sum : sum);
  }
}

// Writes `pixels` pixels of `count` channels: the sums [pixel][kPlane] and the bias.
template <class Element>
void write_pixels(const float* sums, const float* bias, const ConvImages& images, int64_t count,
                  int64_t pixels, bool add, Element* to) {
  if (images.stride_c == 1) {
    for (int64_t p = 0; p < pixels; ++p) {
      write_strided(sums + p * kPlane, bias, add, count, 1, to + p * images.stride_w);
    }
    return;
  }
  for (int64_t c = 0; c < count; c += kSquare) {
    const int64_t channels = part_of_square(count, c);
    for (int64_t p = 0; p < pixels; p += kSquare) {
      const int64_t columns = part_of_square(pixels, p);
      float square[kSquare * kSquare] = {}, turned[kSquare * kSquare];
      const float* from = sums + p * kPlane + c;
      if (columns < kSquare) {
        for (int64_t i = 0; i < columns; ++i) {
          memcpy(square + i * kSquare, from + i * kPlane, kSquare * sizeof *from);
        }
        transpose_square(square, kSquare, turned, kSquare);
      } else {
        transpose_square(from, kPlane, turned, kSquare);
      }
      for (int64_t i = 0; i < channels; ++i) {
        float biases[kSquare];
        for (float& one : biases) one = bias[c + i];
        write_strided(turned + i * kSquare, biases, add, columns, images.stride_w,
                      to + (c + i) * images.stride_c + p * images.stride_w);
      }
    }
  }
}

}  // namespace
}  // namespace fastvq
