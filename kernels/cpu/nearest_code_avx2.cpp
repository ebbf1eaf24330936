// nearest_code in AVX2 with FMA: 16 registers hold a tile of 6 rows × 2 vectors, the 2 vectors of
// codes and one broadcast element.
#include <immintrin.h>

#include "nearest_code.h"

namespace fastvq {
namespace {

struct Floats {
  using Scalar = float;
  static constexpr int64_t kLanes = 8, kPanelVectors = 2, kTileRows = 6;
  __m256 v;

  static Floats load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Floats load_floats(const float* p) { return load(p); }
  static Floats broadcast(float value) { return {_mm256_set1_ps(value)}; }
  static Floats fma(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.v, b.v)}; }
  static Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.v, b.v)}; }
  static Floats sub(Floats a, Floats b) { return {_mm256_sub_ps(a.v, b.v)}; }
  static Floats mul(Floats a, Floats b) { return {_mm256_mul_ps(a.v, b.v)}; }
  static uint32_t at_least(Floats a, Floats b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)));
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  float reduce_max() const {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  }
  float reduce_add() const {
    __m128 m = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_add_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_add_ss(m, _mm_movehdup_ps(m)));
  }
  static void reduce_add4(const Floats* of, float* sums) {
    const __m256 ab = _mm256_hadd_ps(of[0].v, of[1].v), cd = _mm256_hadd_ps(of[2].v, of[3].v);
    const __m256 all = _mm256_hadd_ps(ab, cd);
    const __m128 low = _mm256_castps256_ps128(all), high = _mm256_extractf128_ps(all, 1);
    _mm_storeu_ps(sums, _mm_add_ps(low, high));
  }
};

struct Doubles {
  using Scalar = double;
  static constexpr int64_t kLanes = 4, kPanelVectors = 2, kTileRows = 6;
  __m256d v;

  static Doubles load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static Doubles load_floats(const float* p) { return {_mm256_cvtps_pd(_mm_loadu_ps(p))}; }
  static Doubles broadcast(double value) { return {_mm256_set1_pd(value)}; }
  static Doubles fma(Doubles a, Doubles b, Doubles c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
  static Doubles max(Doubles a, Doubles b) { return {_mm256_max_pd(a.v, b.v)}; }
  static Doubles add(Doubles a, Doubles b) { return {_mm256_add_pd(a.v, b.v)}; }
  static Doubles sub(Doubles a, Doubles b) { return {_mm256_sub_pd(a.v, b.v)}; }
  static Doubles mul(Doubles a, Doubles b) { return {_mm256_mul_pd(a.v, b.v)}; }
  static uint32_t at_least(Doubles a, Doubles b) {
    return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd(a.v, b.v, _CMP_GE_OQ)));
  }
  // Where value is less than least, it and its place take over.
  static void keep_less(Doubles value, Doubles its, Doubles& least, Doubles& place) {
    const __m256d less = _mm256_cmp_pd(value.v, least.v, _CMP_LT_OQ);
    least.v = _mm256_blendv_pd(least.v, value.v, less);
    place.v = _mm256_blendv_pd(place.v, its.v, less);
  }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  double reduce_max() const {
    const __m128d m = _mm_max_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_max_sd(m, _mm_unpackhi_pd(m, m)));
  }
  double reduce_add() const {
    const __m128d m = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(m, _mm_unpackhi_pd(m, m)));
  }
};

}  // namespace
}  // namespace fastvq

#include "nearest_code_direct.h"
#include "nearest_code_search.h"

namespace fastvq {
const NearestCodeSearch nearest_code_avx2_float32 = Search<Floats>::table(1);
const NearestCodeSearch nearest_code_avx2_float64 = Search<Doubles>::table(2);
const NearestCodeDirect nearest_code_avx2_direct = Direct<Floats>::table();
}  // namespace fastvq
