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

template <class Code>
FASTVQ_INLINE const Code* code_row(const CodedRows& rows, int64_t n, int64_t k) {
  return static_cast<const Code*>(rows.codebook) + (n / rows.rows_per_book * rows.K + k) * rows.D;
}

// Rows to fetch ahead of their use: codes and sorted rows lie anywhere.
constexpr int64_t kAhead = 8;

template <class X, class Code>
struct Passes {
  static void gather(const CodedRows& rows, const uint8_t* mask, int64_t mask_rows,
                     int64_t* indices, void* quantized, float* distance, int64_t first,
                     int64_t last) {
    const int64_t D = rows.D;
    for (int64_t n = first; n < last; ++n) {
      Code* q = static_cast<Code*>(quantized) + n * D;
      const bool counts = mask == nullptr || mask[n % mask_rows] != 0;
      if (!counts || indices[n] < 0) {
        const float value = counts ? NAN : 0.0f;
        for (int64_t d = 0; d < D; ++d) q[d] = rounded<Code>(value);
        distance[n] = value;
        indices[n] = -1;
        continue;
      }
      const X* x = static_cast<const X*>(rows.x) + n * D;
      const Code* code = code_row<Code>(rows, n, indices[n]);
      Floats squares = {};
      for (int64_t d = 0; d < D; d += kFloatLanes) {
        const int64_t count = lanes_left(D, d, kFloatLanes);
        const Floats chosen = load_floats<Floats>(code + d, count);
        const Floats difference = load_floats<Floats>(x + d, count) - chosen;
        squares += difference * difference;
        store_floats(chosen, q + d, count);
      }
      distance[n] = sum_of_lanes(squares);
    }
  }

  // λRᵀg = λ(g - 2w(w·g) + 2x̂(q̂·g)), w = (x̂+q̂)/|x̂+q̂|, λ = |q|/|x|; lengths below 1e-6 count as
  // 1e-6 where they divide. As λg + along_sum·(x̂+q̂) + along_x·x̂.
  struct Rotation {
    float x_scale, q_scale;  // 1/|x|, 1/|q|
    float stretch, along_sum, along_x;
  };

  static FASTVQ_INLINE Rotation rotation_of(const X* x, const Code* q, const Code* g, int64_t D) {
    Floats xx = {}, qq = {};
    for (int64_t d = 0; d < D; d += kFloatLanes) {
      const int64_t count = lanes_left(D, d, kFloatLanes);
      const Floats row = load_floats<Floats>(x + d, count);
      const Floats code = load_floats<Floats>(q + d, count);
      xx += row * row;
      qq += code * code;
    }
    const float x_length = fmaxf(sqrtf(sum_of_lanes(xx)), 1e-6f), q_length = sqrtf(sum_of_lanes(qq));
    Rotation r;
    r.x_scale = 1.0f / x_length;
    r.q_scale = 1.0f / fmaxf(q_length, 1e-6f);
    Floats ss = {}, gs = {}, gq = {};
    for (int64_t d = 0; d < D; d += kFloatLanes) {
      const int64_t count = lanes_left(D, d, kFloatLanes);
      const Floats unit_q = load_floats<Floats>(q + d, count) * r.q_scale;
      const Floats sum = load_floats<Floats>(x + d, count) * r.x_scale + unit_q;
      const Floats grad = load_floats<Floats>(g + d, count);
      ss += sum * sum;
      gs += grad * sum;
      gq += grad * unit_q;
    }
    const float sum_length = fmaxf(sqrtf(sum_of_lanes(ss)), 1e-12f);
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
    for (int64_t d = 0; d < D; d += kFloatLanes) {
      const int64_t count = lanes_left(D, d, kFloatLanes);
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
    for (int64_t n = first; n < last; ++n) {
      X* out = static_cast<X*>(grad_x) + n * D;
      if (indices[n] < 0) {
        memset(static_cast<void*>(out), 0, static_cast<size_t>(D) * sizeof(X));
        continue;
      }
      const X* x = static_cast<const X*>(rows.x) + n * D;
      const Code* q = code_row<Code>(rows, n, indices[n]);
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
  }
};

// Sums over listed rows: x itself, or its pull on a code.
template <class X>
struct Sums {
  // Channels d … d+width-1, in kVectors vectors of doubles; the last may be partly used.
  template <int kVectors, bool kPulls>
  static FASTVQ_INLINE void block(const CodedRows& rows, const int64_t* order, int64_t count,
                                  int64_t d, int64_t width, const float* code, const float* weight,
                                  int64_t stride, float* sums) {
    const int64_t D = rows.D, last = width - (kVectors - 1) * kDoubleLanes;
    Doubles total[kVectors] = {};
    HalfFloats target[kVectors] = {};
    if (kPulls) {
      for (int v = 0; v < kVectors; ++v) {
        target[v] = load_floats<HalfFloats>(code + v * kDoubleLanes,
                                            v + 1 < kVectors ? kDoubleLanes : last);
      }
    }
    const X* x = static_cast<const X*>(rows.x) + d;
    for (int64_t i = 0; i < count; ++i) {
      const X* ahead = x + order[i + kAhead < count ? i + kAhead : i] * D;
      __builtin_prefetch(ahead);
      if (kVectors * kDoubleLanes * sizeof(X) > 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(ahead) + 64);
      }
      const X* row = x + order[i] * D;
      const float pull = kPulls ? 2.0f * weight[order[i] * stride] : 0.0f;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        HalfFloats term = load_floats<HalfFloats>(row + v * kDoubleLanes,
                                                  v + 1 < kVectors ? kDoubleLanes : last);
        if (kPulls) term = (target[v] - term) * pull;
        total[v] += __builtin_convertvector(term, Doubles);
      }
    }
    for (int64_t i = 0; i < width; ++i) {
      sums[i] = static_cast<float>(total[i / kDoubleLanes][i % kDoubleLanes]);
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

template <class X, class Body>
FASTVQ_INLINE void with_code_type(const CodedRows& rows, const Body& body) {
  if (rows.codebook_dtype == kFloat32) {
    body(Passes<X, float>());
  } else if (rows.codebook_dtype == kFloat16) {
    body(Passes<X, Half>());
  } else {
    body(Passes<X, BFloat>());
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
