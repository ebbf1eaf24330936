// The row passes of row_passes.h, included by one file per instruction set. A call owns a range of
// rows (or of channels, for the sums). Registers and the first-level cache hold one row of
// everything; nothing is written but the results.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "lanes.h"
#include "row_passes.h"

namespace fastvq {
namespace {

FASTVQ_INLINE int64_t lanes_left(int64_t D, int64_t d, int64_t lanes) {
  return D - d < lanes ? D - d : lanes;
}

// fmaxf would be a call.
FASTVQ_INLINE float at_least(float value, float least) { return value > least ? value : least; }

// Calls body(codes, begin, end) for the rows first … last-1 of each book, `codes` being the book.
template <class Code, class Body>
FASTVQ_INLINE void by_book(const CodedRows& rows, int64_t first, int64_t last, const Body& body) {
  while (first < last) {
    const int64_t book = first / rows.rows_per_book, ends = (book + 1) * rows.rows_per_book;
    const int64_t end = ends < last ? ends : last;
    body(static_cast<const Code*>(rows.codebook) + book * rows.K * rows.D, first, end);
    first = end;
  }
}

// Floats is 16 lanes, or 8 where D is at most that.
template <class X, class Code, class Floats>
struct Passes {
  static constexpr int64_t kLanes = sizeof(Floats) / sizeof(float);

  static void gather(const CodedRows& rows, const uint8_t* mask, int64_t mask_rows,
                     int64_t* indices, void* quantized, float* distance, int64_t first,
                     int64_t last) {
    const int64_t D = rows.D;
    int64_t masked = mask == nullptr ? 0 : first % mask_rows;
    by_book<Code>(rows, first, last, [&](const Code* codes, int64_t n, int64_t end) {
      for (; n < end; ++n) {
        const X* x = static_cast<const X*>(rows.x) + n * D;
        Code* q = static_cast<Code*>(quantized) + n * D;
        const bool counts = mask == nullptr || mask[masked] != 0;
        if (mask != nullptr && ++masked == mask_rows) masked = 0;
        if (counts && indices[n] >= 0) {
          distance[n] = gather_row(x, codes + indices[n] * D, q, D);
        } else {
          distance[n] = counts ? NAN : 0.0f;
          for (int64_t d = 0; d < D; ++d) q[d] = rounded<Code>(distance[n]);
          indices[n] = -1;
        }
      }
    });
  }

  static FASTVQ_INLINE float gather_row(const X* x, const Code* code, Code* q, int64_t D) {
    Floats squares = {};
    for (int64_t d = 0; d < D; d += kLanes) {
      const int64_t count = lanes_left(D, d, kLanes);
      const Floats chosen = load_floats<Floats>(code + d, count);
      const Floats difference = load_floats<Floats>(x + d, count) - chosen;
      squares += difference * difference;
      store_floats(chosen, q + d, count);
    }
    return sum_of_lanes(squares);
  }

  // λRᵀg = λ(g - 2w(w·g) + 2x̂(q̂·g)), w = (x̂+q̂)/|x̂+q̂|, λ = |q|/|x|; lengths below 1e-6 count as
  // 1e-6 where they divide. As λg + along_sum·(x̂+q̂) + along_x·x̂.
  struct Rotation {
    float x_scale, q_scale;  // 1/|x|, 1/|q|
    float stretch, along_sum, along_x;
  };

  static FASTVQ_INLINE Rotation rotation_of(const X* x, const Code* q, const Code* g, int64_t D) {
    Floats xx = {}, qq = {};
    for (int64_t d = 0; d < D; d += kLanes) {
      const int64_t count = lanes_left(D, d, kLanes);
      const Floats row = load_floats<Floats>(x + d, count);
      const Floats code = load_floats<Floats>(q + d, count);
      xx += row * row;
      qq += code * code;
    }
    const float x_length = sqrtf(sum_of_lanes(xx)), q_length = sqrtf(sum_of_lanes(qq));
    Rotation r;
    r.x_scale = 1.0f / at_least(x_length, 1e-6f);
    r.q_scale = 1.0f / at_least(q_length, 1e-6f);
    Floats ss = {}, gs = {}, gq = {};
    for (int64_t d = 0; d < D; d += kLanes) {
      const int64_t count = lanes_left(D, d, kLanes);
      const Floats unit_q = load_floats<Floats>(q + d, count) * r.q_scale;
      const Floats sum = load_floats<Floats>(x + d, count) * r.x_scale + unit_q;
      const Floats grad = load_floats<Floats>(g + d, count);
      ss += sum * sum;
      gs += grad * sum;
      gq += grad * unit_q;
    }
    const float sum_length = at_least(sqrtf(sum_of_lanes(ss)), 1e-12f);
    r.stretch = q_length * r.x_scale;
    r.along_sum = -2.0f * r.stretch * (sum_of_lanes(gs) / sum_length) / sum_length;
    r.along_x = 2.0f * r.stretch * sum_of_lanes(gq);
    return r;
  }

  template <bool kRotates, bool kPulls>
  static FASTVQ_INLINE void backward_row(const X* x, const Code* q, const Code* g, float pull,
                                         X* grad_x, int64_t D) {
    Rotation r = {};
    if (kRotates) r = rotation_of(x, q, g, D);
    for (int64_t d = 0; d < D; d += kLanes) {
      const int64_t count = lanes_left(D, d, kLanes);
      Floats grad = {};
      if (g != nullptr) grad = load_floats<Floats>(g + d, count);
      if (kRotates || kPulls) {
        const Floats row = load_floats<Floats>(x + d, count);
        const Floats code = load_floats<Floats>(q + d, count);
        if (kRotates) {
          const Floats unit_x = row * r.x_scale;
          grad = grad * r.stretch + (unit_x + code * r.q_scale) * r.along_sum + unit_x * r.along_x;
        }
        if (kPulls) grad += (row - code) * pull;
      }
      store_floats(grad, grad_x + d, count);
    }
  }

  static void backward(const CodedRows& rows, const int64_t* indices, const void* grad_quantized,
                       const float* grad_distance, int64_t stride, bool rotation, void* grad_x,
                       int64_t first, int64_t last) {
    const int64_t D = rows.D;
    const bool rotates = rotation && grad_quantized != nullptr;
    by_book<Code>(rows, first, last, [&](const Code* codes, int64_t n, int64_t end) {
      for (; n < end; ++n) {
        const X* x = static_cast<const X*>(rows.x) + n * D;
        X* out = static_cast<X*>(grad_x) + n * D;
        if (indices[n] < 0) {
          memset(static_cast<void*>(out), 0, static_cast<size_t>(D) * sizeof(X));
          continue;
        }
        const Code* q = codes + indices[n] * D;
        const Code* g =
            grad_quantized == nullptr ? nullptr : static_cast<const Code*>(grad_quantized) + n * D;
        const float pull = grad_distance == nullptr ? 0.0f : 2.0f * grad_distance[n * stride];
        if (rotates && grad_distance != nullptr) {
          backward_row<true, true>(x, q, g, pull, out, D);
        } else if (rotates) {
          backward_row<true, false>(x, q, g, pull, out, D);
        } else if (grad_distance != nullptr) {
          backward_row<false, true>(x, q, g, pull, out, D);
        } else {
          backward_row<false, false>(x, q, g, pull, out, D);
        }
      }
    });
  }

  static void subtract(const CodedRows& rows, const int64_t* indices, float* residual,
                       int64_t first, int64_t last) {
    const int64_t D = rows.D;
    const Code* codes = static_cast<const Code*>(rows.codebook);
    for (int64_t n = first; n < last; ++n) {
      const X* x = static_cast<const X*>(rows.x) + n * D;
      float* out = residual + n * D;
      if (indices[n] < 0) {
        for (int64_t d = 0; d < D; ++d) out[d] = NAN;
        continue;
      }
      const Code* code = codes + indices[n] * D;
      for (int64_t d = 0; d < D; d += kLanes) {
        const int64_t count = lanes_left(D, d, kLanes);
        const Floats row = load_floats<Floats>(x + d, count);
        store_floats(row - load_floats<Floats>(code + d, count), out + d, count);
      }
    }
  }

  static void add_up(const CodedRows& rows, const int64_t* indices, int64_t Q, void* quantized,
                     int64_t first, int64_t last) {
    const int64_t D = rows.D, book = rows.K * D;
    const Code* codes = static_cast<const Code*>(rows.codebook);
    for (int64_t n = first; n < last; ++n) {
      const int64_t* index = indices + n * Q;
      Code* out = static_cast<Code*>(quantized) + n * D;
      bool lost = false;
      for (int64_t q = 0; q < Q; ++q) lost |= index[q] < 0;
      for (int64_t d = 0; d < D; d += kLanes) {
        const int64_t count = lanes_left(D, d, kLanes);
        Floats sum = {};
        if (lost) sum += NAN;
        for (int64_t q = 0; q < Q && !lost; ++q) {
          sum += load_floats<Floats>(codes + q * book + index[q] * D + d, count);
        }
        store_floats(sum, out + d, count);
      }
    }
  }
};

constexpr int64_t kSumLanes = 8;
// Rows to fetch ahead of their use: those of a code lie anywhere.
constexpr int64_t kAhead = 8;

// Sums over listed rows: x itself, or its pull on a code.
template <class X>
struct Sums {
  // Channels d … d+width-1, in kVectors vectors of doubles; the last may be partly used.
  template <int kVectors, bool kPulls>
  static FASTVQ_INLINE void block(const CodedRows& rows, const int64_t* order, int64_t count,
                                  int64_t d, int64_t width, const float* code, const float* weight,
                                  int64_t stride, float* sums) {
    const int64_t D = rows.D, last = width - (kVectors - 1) * kSumLanes;
    Doubles8 total[kVectors] = {};
    Floats8 target[kVectors] = {};
    if (kPulls) {
      for (int v = 0; v < kVectors; ++v) {
        target[v] = load_floats<Floats8>(code + v * kSumLanes, v + 1 < kVectors ? kSumLanes : last);
      }
    }
    const X* x = static_cast<const X*>(rows.x) + d;
    for (int64_t i = 0; i < count; ++i) {
      const X* ahead = x + order[i + kAhead < count ? i + kAhead : i] * D;
      __builtin_prefetch(ahead);
      if (kVectors * kSumLanes * sizeof(X) > 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(ahead) + 64);
      }
      const X* row = x + order[i] * D;
      const float pull = kPulls ? 2.0f * weight[order[i] * stride] : 0.0f;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        Floats8 term =
            load_floats<Floats8>(row + v * kSumLanes, v + 1 < kVectors ? kSumLanes : last);
        if (kPulls) term = (target[v] - term) * pull;
        total[v] += __builtin_convertvector(term, Doubles8);
      }
    }
    for (int64_t i = 0; i < width; ++i) {
      sums[i] = static_cast<float>(total[i / kSumLanes][i % kSumLanes]);
    }
  }

  template <bool kPulls>
  static void blocks(const CodedRows& rows, const int64_t* order, int64_t count, int64_t first,
                     int64_t last, const float* code, const float* weight, int64_t stride,
                     float* sums) {
    for (int64_t d = first; d < last; d += kChannelBlock) {
      const int64_t width = lanes_left(last, d, kChannelBlock);
      const float* target = kPulls ? code + (d - first) : nullptr;
      if (width > 24) {
        block<4, kPulls>(rows, order, count, d, width, target, weight, stride, sums + d);
      } else if (width > 16) {
        block<3, kPulls>(rows, order, count, d, width, target, weight, stride, sums + d);
      } else if (width > 8) {
        block<2, kPulls>(rows, order, count, d, width, target, weight, stride, sums + d);
      } else {
        block<1, kPulls>(rows, order, count, d, width, target, weight, stride, sums + d);
      }
    }
  }
};

// ---- choice of the element types --------------------------------------------------------------

template <class X, class Code, class Body>
FASTVQ_INLINE void with_lanes(const CodedRows& rows, const Body& body) {
  if (rows.D <= 8) {
    body(Passes<X, Code, Floats8>());
  } else {
    body(Passes<X, Code, Floats16>());
  }
}

template <class X, class Body>
FASTVQ_INLINE void with_code_type(const CodedRows& rows, const Body& body) {
  if (rows.codebook_dtype == kFloat32) {
    with_lanes<X, float>(rows, body);
  } else if (rows.codebook_dtype == kFloat16) {
    with_lanes<X, Half>(rows, body);
  } else {
    with_lanes<X, BFloat>(rows, body);
  }
}

template <class Body>
FASTVQ_INLINE void with_types(const CodedRows& rows, const Body& body) {
  if (rows.x_dtype == kFloat32) {
    with_code_type<float>(rows, body);
  } else if (rows.x_dtype == kFloat16) {
    with_code_type<Half>(rows, body);
  } else {
    with_code_type<BFloat>(rows, body);
  }
}

template <class Body>
FASTVQ_INLINE void with_row_type(const CodedRows& rows, const Body& body) {
  if (rows.x_dtype == kFloat32) {
    body(Sums<float>());
  } else if (rows.x_dtype == kFloat16) {
    body(Sums<Half>());
  } else {
    body(Sums<BFloat>());
  }
}

void gather(const CodedRows& rows, const uint8_t* mask, int64_t mask_rows, int64_t* indices,
            void* quantized, float* distance, int64_t first, int64_t last) {
  with_types(rows, [&](auto passes) {
    passes.gather(rows, mask, mask_rows, indices, quantized, distance, first, last);
  });
}

void backward(const CodedRows& rows, const int64_t* indices, const void* grad_quantized,
              const float* grad_distance, int64_t stride, bool rotation, void* grad_x,
              int64_t first, int64_t last) {
  with_types(rows, [&](auto passes) {
    passes.backward(rows, indices, grad_quantized, grad_distance, stride, rotation, grad_x, first,
                    last);
  });
}

void subtract(const CodedRows& rows, const int64_t* indices, float* residual, int64_t first,
              int64_t last) {
  with_types(rows, [&](auto passes) { passes.subtract(rows, indices, residual, first, last); });
}

void add_up(const CodedRows& rows, const int64_t* indices, int64_t Q, void* quantized,
            int64_t first, int64_t last) {
  with_code_type<float>(
      rows, [&](auto passes) { passes.add_up(rows, indices, Q, quantized, first, last); });
}

void sum(const CodedRows& rows, const int64_t* order, int64_t count, int64_t first, int64_t last,
         float* sums) {
  with_row_type(rows, [&](auto kind) {
    kind.template blocks<false>(rows, order, count, first, last, nullptr, nullptr, 0, sums);
  });
}

// The code's channels are widened a block at a time, so that nothing is allocated here.
void sum_pulls(const CodedRows& rows, const int64_t* order, int64_t count, int64_t first,
               int64_t last, float* sums, int64_t code, const float* weight, int64_t stride) {
  float target[kChannelBlock];
  for (int64_t d = first; d < last; d += kChannelBlock) {
    const int64_t width = lanes_left(last, d, kChannelBlock);
    read_floats(rows.codebook, rows.codebook_dtype, code * rows.D + d, width, target);
    with_row_type(rows, [&](auto kind) {
      kind.template blocks<true>(rows, order, count, d, d + width, target, weight, stride, sums);
    });
  }
}

}  // namespace
}  // namespace fastvq
