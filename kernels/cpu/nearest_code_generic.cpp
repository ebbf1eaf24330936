// nearest_code for any processor: 16-byte vectors in the compilers' own vector types (SSE2 on x86,
// NEON on Arm), products rounded before they are added.
#include "nearest_code.h"

namespace fastvq {
namespace {

template <class Number, int kWidth>
struct Vector {
  using Scalar = Number;
  static constexpr int64_t kLanes = kWidth, kPanelVectors = 2, kTileRows = 4;
  typedef Number Native __attribute__((vector_size(16)));
  Native v;

  static Vector load(const Number* p) {
    Vector result;
    __builtin_memcpy(&result.v, p, sizeof result.v);
    return result;
  }
  static Vector load_floats(const float* p) {
    Vector result;
    for (int i = 0; i < kWidth; ++i) result.v[i] = static_cast<Number>(p[i]);
    return result;
  }
  static Vector broadcast(Number value) { return {Native{} + value}; }
  static Vector fma(Vector a, Vector b, Vector c) { return {a.v * b.v + c.v}; }
  static Vector max(Vector a, Vector b) { return {a.v > b.v ? a.v : b.v}; }
  static Vector add(Vector a, Vector b) { return {a.v + b.v}; }
  static Vector sub(Vector a, Vector b) { return {a.v - b.v}; }
  static Vector mul(Vector a, Vector b) { return {a.v * b.v}; }
  static uint32_t at_least(Vector a, Vector b) {
    uint32_t lanes = 0;
    for (int i = 0; i < kWidth; ++i) lanes |= (a.v[i] >= b.v[i] ? 1u : 0u) << i;
    return lanes;
  }
  // Where value is less than least, it and its place take over.
  static void keep_less(Vector value, Vector its, Vector& least, Vector& place) {
    place.v = value.v < least.v ? its.v : place.v;
    least.v = value.v < least.v ? value.v : least.v;
  }
  void store(Number* p) const { __builtin_memcpy(p, &v, sizeof v); }
  Number reduce_max() const {
    Number best = v[0];
    for (int i = 1; i < kWidth; ++i) best = v[i] > best ? v[i] : best;
    return best;
  }
  Number reduce_add() const {
    Number sum = v[0];
    for (int i = 1; i < kWidth; ++i) sum += v[i];
    return sum;
  }
  static void reduce_add4(const Vector* of, Number* sums) {
    for (int i = 0; i < 4; ++i) sums[i] = of[i].reduce_add();
  }
};

using Floats = Vector<float, 4>;
using Doubles = Vector<double, 2>;

}  // namespace
}  // namespace fastvq

#include "nearest_code_direct.h"
#include "nearest_code_search.h"

namespace fastvq {
const NearestCodeSearch nearest_code_generic_float32 = Search<Floats>::table(1);
const NearestCodeSearch nearest_code_generic_float64 = Search<Doubles>::table(2);
const NearestCodeDirect nearest_code_generic_direct = Direct<Floats>::table();
}  // namespace fastvq
