// Vectors of AVX-512 (F, BW, DQ, VL) for the searches; included only by files compiled for it.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace fastvq {
namespace {

struct Floats {
  using Scalar = float;
  static constexpr int64_t kLanes = 16, kPanelVectors = 4, kTileRows = 6;
  __m512 v;

  static Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Floats load_floats(const float* p) { return load(p); }
  static Floats broadcast(float value) { return {_mm512_set1_ps(value)}; }
  static Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
  static Floats add(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
  static Floats sub(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
  static Floats mul(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
  static uint32_t at_least(Floats a, Floats b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  float reduce_max() const { return _mm512_reduce_max_ps(v); }
  float reduce_add() const { return _mm512_reduce_add_ps(v); }
  // The four vectors' sums.
  static void reduce_add4(const Floats* of, float* sums) {
    const __m512 ab =
        _mm512_add_ps(_mm512_unpacklo_ps(of[0].v, of[1].v), _mm512_unpackhi_ps(of[0].v, of[1].v));
    const __m512 cd =
        _mm512_add_ps(_mm512_unpacklo_ps(of[2].v, of[3].v), _mm512_unpackhi_ps(of[2].v, of[3].v));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }
};

struct Doubles {
  using Scalar = double;
  static constexpr int64_t kLanes = 8, kPanelVectors = 4, kTileRows = 6;
  __m512d v;

  static Doubles load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static Doubles load_floats(const float* p) { return {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
  static Doubles broadcast(double value) { return {_mm512_set1_pd(value)}; }
  static Doubles fma(Doubles a, Doubles b, Doubles c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
  static Doubles max(Doubles a, Doubles b) { return {_mm512_max_pd(a.v, b.v)}; }
  static Doubles add(Doubles a, Doubles b) { return {_mm512_add_pd(a.v, b.v)}; }
  static Doubles sub(Doubles a, Doubles b) { return {_mm512_sub_pd(a.v, b.v)}; }
  static Doubles mul(Doubles a, Doubles b) { return {_mm512_mul_pd(a.v, b.v)}; }
  static uint32_t at_least(Doubles a, Doubles b) {
    return _mm512_cmp_pd_mask(a.v, b.v, _CMP_GE_OQ);
  }
  // Where value is less than least, it and its place take over.
  static void keep_less(Doubles value, Doubles its, Doubles& least, Doubles& place) {
    const __mmask8 less = _mm512_cmp_pd_mask(value.v, least.v, _CMP_LT_OQ);
    least.v = _mm512_mask_mov_pd(least.v, less, value.v);
    place.v = _mm512_mask_mov_pd(place.v, less, its.v);
  }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  double reduce_max() const { return _mm512_reduce_max_pd(v); }
  double reduce_add() const { return _mm512_reduce_add_pd(v); }
};

}  // namespace
}  // namespace fastvq
