// What decides among a row's candidates: their scores in float32 with a bound, then the canonical
// ones. Internal linkage throughout, as in nearest_code_search.h.
//
// Write u = 2^-24, w for the winner by canonical score and m for the best by float32 score.
// L2: ŝ = Σ (x-c)², each difference rounded, added in any order: |ŝ - s| ≤ κ·s + α with
//   κ = 1.01·(D+3)·u (D ≤ 2^17) and α = D·2^-126 for what underflow may lose. Canonical sums are
//   within δ = (D+3)·2^-53 of theirs, relatively, so s_w ≤ s_m·(1+2.01δ) and
//   ŝ_w ≤ ŝ_m·(1 + 2.05κ + 3δ) + 4α. No term is large unless the score is: no offset hurts.
// Dot: |ŝ - s| ≤ κ·|x||c| + α, and canonical sums are within δ·|x||c|:
//   ŝ_w ≥ ŝ_m - (2κ + 4δ)·|x|·max|c| - 4α.
// Where ŝ_m, or |x|·max|c|, reaches 2^120 a sum may have overflowed and every candidate stays.
#pragma once

#include <math.h>
#include <stdint.h>

#include "nearest_code.h"
#include "rows.h"

namespace fastvq {
namespace {

// Σ_d (x_d - c_d)² or Σ_d x_d·c_d in float64, in order, every product rounded (the files are
// compiled without contraction to fused operations), for kLanes pairs of rows side by side: one
// chain of additions alone would wait for each of them.
template <int kPairs>
inline void canonical_scores(const float* const* x, const float* const* code, int64_t D, int metric,
                             double* scores) {
  constexpr int64_t kSlice = 64;
  double terms[kPairs][kSlice];
  for (int i = 0; i < kPairs; ++i) scores[i] = 0.0;
  for (int64_t first = 0; first < D; first += kSlice) {
    const int64_t count = D - first < kSlice ? D - first : kSlice;
    for (int i = 0; i < kPairs; ++i) {
      const float *a = x[i] + first, *b = code[i] + first;
      if (metric == kL2) {
        for (int64_t d = 0; d < count; ++d) {
          const double difference = static_cast<double>(a[d]) - static_cast<double>(b[d]);
          terms[i][d] = difference * difference;
        }
      } else {
        for (int64_t d = 0; d < count; ++d) {
          terms[i][d] = static_cast<double>(a[d]) * static_cast<double>(b[d]);
        }
      }
    }
    double sums[kPairs];
    for (int i = 0; i < kPairs; ++i) sums[i] = scores[i];
    for (int64_t d = 0; d < count; ++d) {
#pragma GCC unroll 8
      for (int i = 0; i < kPairs; ++i) sums[i] += terms[i][d];
    }
    for (int i = 0; i < kPairs; ++i) scores[i] = sums[i];
  }
}

inline double canonical_score(const float* x, const float* code, int64_t D, int metric) {
  double score;
  canonical_scores<1>(&x, &code, D, metric, &score);
  return score;
}

inline bool better(double score, double best, int metric) {
  return metric == kL2 ? score < best : score > best;
}

// The canonical winner among kept codes found[0 … count-1], count ≥ 1.
inline int64_t best_of(const NearestCodeProblem& p, const float* x, const int64_t* found,
                       int64_t count) {
  constexpr int kSide = 8;
  const int64_t width = padded_width(p.D);
  int64_t winner = -1;
  double best = 0.0;
  for (int64_t first = 0; first < count; first += kSide) {
    const float *rows[kSide], *codes[kSide];
    double scores[kSide] = {};
    for (int i = 0; i < kSide; ++i) {
      const int64_t at = first + i < count ? first + i : first;
      rows[i] = x;
      codes[i] = p.codes + found[at] * width;
    }
    if (count - first > 2) {
      canonical_scores<kSide>(rows, codes, p.D, p.metric, scores);
    } else {
      canonical_scores<2>(rows, codes, p.D, p.metric, scores);
    }
    for (int64_t i = 0; i < kSide && first + i < count; ++i) {
      const int64_t k = found[first + i];
      if (winner < 0 || better(scores[i], best, p.metric) || (scores[i] == best && k < winner)) {
        winner = k;
        best = scores[i];
      }
    }
  }
  return winner;
}

// Reads row n as float32, zeros after its end.
inline void read_row(const NearestCodeProblem& p, int64_t n, float* out) {
  read_floats(p.x, p.x_dtype, n * p.D, p.D, out);
  for (int64_t d = p.D; d < padded_width(p.D); ++d) out[d] = 0.0f;
}

// Floats of scratch that write_distances needs.
inline int64_t distance_floats(int64_t D) { return 8 * padded_width(D); }

// distance of the rows listed from their indices; codes by kept id, -1 for none. kHardRow is left.
inline void write_distances(const NearestCodeProblem& p, const int64_t* rows, const int64_t* kept,
                            int64_t count, float* scratch) {
  constexpr int kSide = 8;
  const int64_t width = padded_width(p.D);
  const float *x[kSide], *codes[kSide];
  int64_t at[kSide];
  int waiting = 0;
  for (int64_t i = 0; i <= count; ++i) {
    if (i < count) {
      if (kept[i] == kHardRow) continue;
      if (kept[i] < 0) {
        p.distance[rows[i]] = NAN;
        continue;
      }
      read_row(p, rows[i], scratch + waiting * width);
      x[waiting] = scratch + waiting * width;
      codes[waiting] = p.codes + kept[i] * width;
      at[waiting++] = rows[i];
    }
    if (waiting == 0 || (waiting < kSide && i < count)) continue;
    double scores[kSide] = {};
    for (int j = waiting; j < kSide; ++j) {
      x[j] = x[0];
      codes[j] = codes[0];
    }
    canonical_scores<kSide>(x, codes, p.D, p.metric, scores);
    for (int j = 0; j < waiting; ++j) p.distance[at[j]] = static_cast<float>(scores[j]);
    waiting = 0;
  }
}

// One row's scores of four codes in float32, along the row.
template <class Vec>
inline void direct_scores(const float* x, const float* const* codes, int64_t width, int metric,
                          float* scores) {
  Vec sums[4] = {Vec::broadcast(0.0f), Vec::broadcast(0.0f), Vec::broadcast(0.0f),
                 Vec::broadcast(0.0f)};
  for (int64_t d = 0; d < width; d += Vec::kLanes) {
    const Vec element = Vec::load(x + d);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Vec code = Vec::load(codes[i] + d);
      if (metric == kL2) {
        const Vec difference = Vec::sub(element, code);
        sums[i] = Vec::fma(difference, difference, sums[i]);
      } else {
        sums[i] = Vec::fma(element, code, sums[i]);
      }
    }
  }
  Vec::reduce_add4(sums, scores);
}

// The greatest cost (L2: ŝ, dot: -ŝ) with which a candidate may still win, `least` being the least
// (see above); `reach` bounds |x|·max|c| (dot only).
inline double direct_threshold(double least, double reach, int64_t D, int metric) {
  const double kappa = 1.01 * static_cast<double>(D + 3) * 0x1p-24;
  const double delta = static_cast<double>(D + 3) * 0x1p-53;
  const double alpha = static_cast<double>(D) * 0x1p-126;
  if (metric == kL2) {
    if (!(least < 0x1p120)) return static_cast<double>(INFINITY);
    return least * (1 + 2.05 * kappa + 3 * delta) + 4 * alpha;
  }
  if (!(reach < 0x1p120)) return static_cast<double>(INFINITY);
  return least + (2 * kappa + 4 * delta) * reach + 4 * alpha;
}

// The winner among found[0 … count-1] (count ≥ 1), or kHardRow where more than `limit` of them are
// too close for float32. `costs` has room for count + 3 numbers; found is overwritten.
template <class Vec>
inline int64_t settle_candidates(const NearestCodeProblem& p, const float* x, double reach,
                                 int64_t* found, int64_t count, int64_t limit, float* costs) {
  if (count == 1) return found[0];
  const int64_t width = padded_width(p.D);
  const float sign = p.metric == kL2 ? 1.0f : -1.0f;
  float least = INFINITY;
  for (int64_t i = 0; i < count; i += 4) {
    const float* codes[4];
    for (int64_t j = 0; j < 4; ++j) codes[j] = p.codes + found[i + j < count ? i + j : i] * width;
    direct_scores<Vec>(x, codes, width, p.metric, costs + i);
    for (int64_t j = i; j < i + 4; ++j) {
      costs[j] *= sign;
      least = costs[j] < least ? costs[j] : least;
    }
  }
  const double threshold = direct_threshold(static_cast<double>(least), reach, p.D, p.metric);
  int64_t left = 0;
  for (int64_t i = 0; i < count; ++i) {
    const bool loses = static_cast<double>(costs[i]) > threshold;
    found[left] = found[i];
    left += !loses;  // NaN, from an overflow, stays
  }
  if (left == 1) return found[0];
  return left > limit ? kHardRow : best_of(p, x, found, left);
}

}  // namespace
}  // namespace fastvq
