// Both directions of the gate for one instruction set; included by one file each, which defines
// FASTVQ_VECTOR_BYTES. Everything has internal linkage.
//
// A call owns a range of pixels. A vector of channels is added up, gated and dropped in registers;
// sums of features, gates and masks are never written to memory.
#pragma once

#include "gate_lanes.h"
#include "gated_activation.h"
#include "lanes.h"

namespace fastvq {
namespace {

typedef uint64_t Longs __attribute__((vector_size(FASTVQ_VECTOR_BYTES)));
typedef uint32_t Bits __attribute__((vector_size(FASTVQ_VECTOR_BYTES)));

// SplitMix64's output function (Steele, Lea and Flood 2014).
inline Longs mixed(Longs bits) {
  bits = (bits ^ (bits >> 30)) * uint64_t{0xBF58476D1CE4E5B9};
  bits = (bits ^ (bits >> 27)) * uint64_t{0x94D049BB133111EB};
  return bits ^ (bits >> 31);
}

template <class Element>
class Gate {
 public:
  explicit Gate(const GatedActivation& call) : call_(call), pairs_((call.C + 1) / 2) {
    for (int64_t i = 0; i < kLanes / 2; ++i) steps_[i] = static_cast<uint64_t>(i + 1) * kIncrement;
  }

  void forward(void* gated, int64_t first, int64_t last) const {
    for (int64_t n = first; n < last; ++n) {
      Element* out = static_cast<Element*>(gated) + n * call_.C;
      over_channels([&](int64_t c, int64_t count) {
        const Floats value = gate(features(n, c, count), features(n, call_.C + c, count));
        store_floats(dropped(value, n, c), out + c, count);
      });
    }
  }

  void backward(const void* grad, void* grad_features, float* sums, void* gated, int64_t first,
                int64_t last) const {
    const int64_t C = call_.C, per_picture = sums_per_picture(call_.P);
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t begin = unit % per_picture * kPixelsPerSum;
      const int64_t end = begin + kPixelsPerSum < call_.P ? begin + kPixelsPerSum : call_.P;
      const int64_t picture = unit / per_picture * call_.P;
      float* sum = sums + unit * 2 * C;
      memset(sum, 0, static_cast<size_t>(2 * C) * sizeof *sum);
      for (int64_t n = picture + begin; n < picture + end; ++n) {
        const Element* g = static_cast<const Element*>(grad) + n * C;
        Element* to = static_cast<Element*>(grad_features) + n * 2 * C;
        Element* again = static_cast<Element*>(gated) + n * C;
        over_channels([&](int64_t c, int64_t count) {
          const ValueAndSlope t = tangent(features(n, c, count));
          const ValueAndSlope s = logistic(features(n, C + c, count));
          const Floats kept = dropped(load_floats<Floats>(g + c, count), n, c);
          put(kept * t.slope * s.value, c, count, to, sum);
          put(kept * t.value * s.slope, C + c, count, to, sum);
          store_floats(dropped(t.value * s.value, n, c), again + c, count);
        });
      }
    }
  }

 private:
  static constexpr uint64_t kIncrement = 0x9E3779B97F4A7C15;

  template <class Body>
  FASTVQ_INLINE void over_channels(const Body& body) const {
    int64_t c = 0;
    for (; c + kLanes <= call_.C; c += kLanes) body(c, kLanes);
    if (c < call_.C) body(c, call_.C - c);
  }

  FASTVQ_INLINE static Floats read(const void* base, int64_t at, int64_t count) {
    return load_floats<Floats>(static_cast<const Element*>(base) + at, count);
  }

  FASTVQ_INLINE Floats features(int64_t n, int64_t c, int64_t count) const {
    Floats sum = read(call_.features, n * 2 * call_.C + c, count);
    if (call_.class_bias != nullptr) {
      sum += read(call_.class_bias, n / call_.P * call_.class_stride + c, count);
    }
    if (call_.mapped != nullptr) sum += read(call_.mapped, n * call_.mapped_stride + c, count);
    return sum;
  }

  FASTVQ_INLINE Floats dropped(Floats value, int64_t n, int64_t c) const {
    if (call_.threshold == 0) return value;
    const uint64_t before = static_cast<uint64_t>(n * pairs_ + c / 2);
    const Longs hashed = mixed(steps_ + (call_.stream + before * kIncrement));
    Bits bits;
    memcpy(&bits, &hashed, sizeof bits);
    const bool none = call_.threshold > 0xFFFFFFFFu;
    const Floats kept = value * call_.scale;
    return none ? Floats{} : (bits >= static_cast<uint32_t>(call_.threshold) ? kept : Floats{});
  }

  FASTVQ_INLINE static void put(Floats value, int64_t c, int64_t count, Element* to, float* sum) {
    store_floats(value, to + c, count);
    store_floats(load_floats<Floats>(sum + c, count) + value, sum + c, count);
  }

  const GatedActivation& call_;
  const int64_t pairs_;
  Longs steps_;
};

template <class Body>
FASTVQ_INLINE void with_dtype(const GatedActivation& call, const Body& body) {
  if (call.dtype == kFloat32) {
    body(Gate<float>(call));
  } else if (call.dtype == kFloat16) {
    body(Gate<Half>(call));
  } else {
    body(Gate<BFloat>(call));
  }
}

void gate_forward(const GatedActivation& call, void* gated, int64_t first, int64_t last) {
  with_dtype(call, [&](const auto& pass) { pass.forward(gated, first, last); });
}

void gate_backward(const GatedActivation& call, const void* grad, void* grad_features, float* sums,
                   void* gated, int64_t first, int64_t last) {
  with_dtype(call, [&](const auto& pass) {
    pass.backward(grad, grad_features, sums, gated, first, last);
  });
}

}  // namespace
}  // namespace fastvq
