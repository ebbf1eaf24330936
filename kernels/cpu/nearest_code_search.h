// The nearest-code search, compiled once per instruction set (nearest_code_*.cpp) over that file's
// vector types. Everything has internal linkage and nothing of the C++ standard library is used:
// a shared inline function could be linked from the file with the widest instructions.
//
// A call owns up to kBlockRows rows. In registers: a tile of TILE_ROWS rows by one panel of codes.
// In the caches: one panel (transposed codes), the rows, and per row and group of panels one vector
// of maxima. Never written: the rows × codes scores.
//
// 1. Fast pass, in T = float or double, on y = x - center and e_k = c_k - center (dot: y = x), each
//    difference rounded to T: s_k = y·e_k + o_k with o_k = -|e_k|²/2 (L2) or 0 (dot). What is left
//    out, |y|² or x·center, is constant over k: |x - c_k|² = |y|² - 2 s_k. Per lane, the maximum
//    over a group of panels is kept.
// 2. Candidates: every code whose computed score is at least (greatest computed) - slack.
// 3. One candidate left: it is the answer. Several: each gets its canonical score, float64 in the
//    order d = 0 … D-1; the best one wins. Too many, or a row outside the float bound's range: the
//    float search marks the row kHardRow, the double search scores all codes of the groups in
//    question canonically, one code per lane; where the first rows of a block have most groups in
//    question, it leaves out steps 1 and 2 for the others.
//
// Why the answer is always among the candidates. Write u = 2^-24 (float) or 2^-53 (double), C for
// the greatest |e_k|, A = |y|C + C²/2 (L2) or |y|C (dot). With m the code of the greatest computed
// score ŝ_m and w the winner by canonical score:
//   a. A sum of n terms, added in any order with or without fused multiply-add, differs from the
//      exact one by at most n·u·(1 + n·u)·Σ|terms|: each term meets at most n roundings, the
//      product's included. The terms are D products, whose factors carry one more rounding each,
//      and o_k, rounded from a float64 sum of D squares. Together |ŝ_k - s_k| ≤ E, with
//      E = 1.01·(D+4)·u·A for float (D ≤ 2^17 keeps n·u below 0.008; the D·2^-53 of o_k's own sum
//      is inside the 1.01), and E = 1.01·2(D+4)·u·A for double.
//   b. Float only: flushing subnormal factors to zero moves a score by at most 2^-126·√D·(|y|+C),
//      and each of the D+1 operations may lose 2^-126 to underflow, whatever the processor's mode:
//      E grows by 2^-126·(D+2)·(1+|y|+C). In double no product of two floats underflows.
//   c. The canonical L2 score S_k is within (D+2)·2^-53 of |x - c_k|², relatively: each term meets
//      three roundings (difference twice, square) and D-1 additions. S_w ≤ S_m then gives
//      s_w ≥ s_m - F, F = (D+4)·2^-53·(|y| + C)². The canonical dot score is within
//      D·2^-53·|x||c_k|: F = 2(D+4)·2^-53·|x|(C + |center|).
//   d. ŝ_w ≥ s_w - E ≥ s_m - E - F ≥ ŝ_m - 2E - F, as is any other computed score of w within E.
//      slack = 2E + 1.01·F.
//   e. L2 only: a code with |e_k| > R = 4|y| + 2r, r = the least norm, has s_k ≤ -|e_k|²/4 ≤
//      -(2|y| + r)², computed to within 3% of that, while the code of norm r has
//      s ≥ -(|y|r + r²/2). It is neither m nor w, so C may be taken as R where that is smaller:
//      one far-off code costs the others nothing.
// Overflow: the float search takes only rows with A, C and |y|·C below 2^120, so that no partial
// sum overflows (an o_k of -Inf is a score of -Inf), and A > 2^-60, so that term b stays far below
// E. Double sums stay below 2^259·(D+1).
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "nearest_code.h"
#include "nearest_code_rescore.h"
#include "rows.h"

namespace fastvq {
namespace {

constexpr int64_t kMaxGroups = 16;  // vectors of maxima kept per row (at most twice as many)
constexpr int kMaxHits = 8;         // (group, lane) pairs looked into before a row counts as hard
constexpr int kMaxCandidates = 16;  // codes scored canonically one by one
constexpr double kUnit32 = 0x1p-24, kUnit64 = 0x1p-53;

// What a row is, once read.
enum RowKind : int32_t { kOrdinary, kNotFinite, kOutOfRange, kUnscored };

template <class Vec>
struct Search {
  using T = typename Vec::Scalar;
  static constexpr bool kIsFloat = sizeof(T) == 4;
  static constexpr int64_t kLanes = Vec::kLanes, kVectors = Vec::kPanelVectors;
  static constexpr int64_t kPanel = kLanes * kVectors, kTileRows = Vec::kTileRows;
  static constexpr int64_t kTileBlock = (kBlockRows + kTileRows - 1) / kTileRows * kTileRows;

  static int64_t num_panels(const NearestCodeProblem& p) {
    return (p.num_codes + kPanel - 1) / kPanel;
  }
  static int64_t panels_per_group(const NearestCodeProblem& p) {
    const int64_t panels = num_panels(p);
    return panels <= kMaxGroups ? 1 : panels / kMaxGroups;
  }
  static int64_t num_groups(const NearestCodeProblem& p) {
    const int64_t per_group = panels_per_group(p);
    return (num_panels(p) + per_group - 1) / per_group;
  }

  // ---- packed codes: per panel, one row of offsets, then D rows of channels (kPanel numbers
  // each); for double also D rows of the codes themselves, for the canonical scores
  // -----------------------

  static int64_t panel_stride(int64_t D) { return (D + 1) * kPanel + (kIsFloat ? 0 : D * kPanel); }

  static size_t panel_bytes(const NearestCodeProblem& p) {
    return static_cast<size_t>(num_panels(p) * panel_stride(p.D)) * sizeof(T);
  }

  // value - center in T; a subnormal float, slow to compute with, becomes zero.
  static T centered(float value, float center) {
    const T difference = static_cast<T>(value) - static_cast<T>(center);
    if (!kIsFloat) return difference;
    return fabsf(static_cast<float>(difference)) < 0x1p-126f ? T(0) : difference;
  }

  static void pack(const NearestCodeProblem& p, void* panels) {
    const int64_t width = padded_width(p.D);
    T* out = static_cast<T*>(panels);
    for (int64_t first = 0; first < p.num_codes; first += kPanel) {
      T* canonical = out + (p.D + 1) * kPanel;
      for (int64_t j = 0; j < kPanel; ++j) {
        const int64_t k = first + j;
        const bool real = k < p.num_codes;  // the last panel's spare lanes never win
        out[j] = real ? static_cast<T>(p.offsets[k]) : -static_cast<T>(INFINITY);
        for (int64_t d = 0; d < p.D; ++d) {
          const float element = real ? p.codes[k * width + d] : p.center[d];
          out[(d + 1) * kPanel + j] = centered(element, p.center[d]);
          // NaN loses every comparison.
          if (!kIsFloat) canonical[d * kPanel + j] = real ? static_cast<T>(element) : T(NAN);
        }
      }
      out += panel_stride(p.D);
    }
  }

  // ---- scratch of one call
  // ------------------------------------------------------------------------

  struct Scratch {
    T* rows;                    // kTileBlock rows of padded_width(D)
    T* maxima;                  // kTileBlock × num_groups vectors
    float* row;                 // one row of x; distance_floats(D)
    double slacks[kTileBlock];  // of step 2
    T thresholds[kTileBlock];
    RowKind kinds[kTileBlock];
  };

  static size_t scratch_bytes(const NearestCodeProblem& p) {
    const size_t width = static_cast<size_t>(padded_width(p.D));
    const size_t maxima = static_cast<size_t>(num_groups(p) * kLanes);
    return kTileBlock * (width + maxima) * sizeof(T) +
           static_cast<size_t>(distance_floats(p.D)) * sizeof(float);
  }

  // ---- reading rows
  // -------------------------------------------------------------------------------

  // Slack of step 2 for a row with |y| ≤ norm, or a negative number where the float bound does not
  // hold.
  static double slack(const NearestCodeProblem& p, double norm) {
    const double D = static_cast<double>(p.D);
    double C = p.max_norm, A, F;
    if (p.metric == kL2) {
      C = fmin(C, 4 * norm + 2 * p.min_norm);
      A = norm * C + C * C / 2;
      F = (D + 4) * kUnit64 * (norm + C) * (norm + C);
    } else {
      A = norm * C;
      F = 2 * (D + 4) * kUnit64 * norm * (C + p.center_norm);
    }
    if (!kIsFloat) return 1.01 * (4 * (D + 4) * kUnit64 * A + F);
    const bool in_range = A > 0x1p-60 && A < 0x1p120 && p.max_norm < 0x1p120 &&
                          norm * p.max_norm < 0x1p120 && p.D <= (int64_t{1} << 17);
    if (!in_range) return -1.0;
    const double E = 1.01 * (D + 4) * kUnit32 * A + 0x1p-126 * (D + 2) * (1 + norm + C);
    return 2 * E + 1.01 * F;
  }

  // Fills row i of the block; rows that the fast pass must not see become zero.
  static void load_row(const NearestCodeProblem& p, int64_t n, int64_t i, Scratch& s) {
    const int64_t width = padded_width(p.D);
    T* out = s.rows + i * width;
    read_row(p, n, s.row);
    for (int64_t d = 0; d < width; ++d) out[d] = centered(s.row[d], p.row_center[d]);
    Vec squares = Vec::broadcast(T(0));
    for (int64_t d = 0; d < width; d += kLanes) {
      const Vec value = Vec::load(out + d);
      squares = Vec::fma(value, value, squares);
    }
    // 1.01: the sum's own rounding for D ≤ 2^17; 2^-126 D: what underflow and flushing may hide.
    const double sum = static_cast<double>(squares.reduce_add());
    const double hidden = kIsFloat ? 0x1p-126 * static_cast<double>(p.D) : 0.0;
    s.slacks[i] = slack(p, sqrt(1.01 * sum + hidden));
    s.kinds[i] = s.slacks[i] >= 0 ? kOrdinary : kOutOfRange;
    if (!(sum < INFINITY)) {
      for (int64_t d = 0; d < p.D; ++d) {
        if (!is_finite(s.row[d])) s.kinds[i] = kNotFinite;
      }
    }
    if (s.kinds[i] != kOrdinary) {
      for (int64_t d = 0; d < width; ++d) out[d] = T(0);
    }
  }

  // ---- step 1
  // -------------------------------------------------------------------------------------

  // Scores kTileRows rows against one panel; folds the panel's vectors into one maximum per lane.
  static void score_tile(const T* panel, const T* rows, int64_t width, int64_t D, bool fresh,
                         T* maxima, int64_t maxima_stride) {
    Vec score[kTileRows][kVectors];
#pragma GCC unroll 16
    for (int64_t v = 0; v < kVectors; ++v) {
      const Vec offset = Vec::load(panel + v * kLanes);
#pragma GCC unroll 16
      for (int64_t r = 0; r < kTileRows; ++r) score[r][v] = offset;
    }
    for (int64_t d = 0; d < D; ++d) {
      panel += kPanel;
      Vec code[kVectors];
#pragma GCC unroll 16
      for (int64_t v = 0; v < kVectors; ++v) code[v] = Vec::load(panel + v * kLanes);
#pragma GCC unroll 16
      for (int64_t r = 0; r < kTileRows; ++r) {
        const Vec element = Vec::broadcast(rows[r * width + d]);
#pragma GCC unroll 16
        for (int64_t v = 0; v < kVectors; ++v) {
          score[r][v] = Vec::fma(element, code[v], score[r][v]);
        }
      }
    }
#pragma GCC unroll 16
    for (int64_t r = 0; r < kTileRows; ++r) {
      Vec best = score[r][0];
#pragma GCC unroll 16
      for (int64_t v = 1; v < kVectors; ++v) best = Vec::max(best, score[r][v]);
      T* kept = maxima + r * maxima_stride;
      (fresh ? best : Vec::max(best, Vec::load(kept))).store(kept);
    }
  }

  // Rows first … last-1 of the block; first is a multiple of kTileRows.
  static void score_rows(const NearestCodeProblem& p, const T* panels, int64_t first, int64_t last,
                         const Scratch& s) {
    const int64_t width = padded_width(p.D), per_group = panels_per_group(p);
    const int64_t stride = num_groups(p) * kLanes;
    for (int64_t panel = 0; panel < num_panels(p); ++panel) {
      T* maxima = s.maxima + panel / per_group * kLanes;
      const bool fresh = panel % per_group == 0;
      for (int64_t i = first; i < last; i += kTileRows) {
        score_tile(panels + panel * panel_stride(p.D), s.rows + i * width, width, p.D, fresh,
                   maxima + i * stride, stride);
      }
    }
  }

  // ---- step 2
  // -------------------------------------------------------------------------------------

  // The greatest T not above `value`.
  static T round_down(double value) {
    if (!kIsFloat) return static_cast<T>(value);
    const float rounded = static_cast<float>(value);
    return static_cast<T>(rounded > value ? nextafterf(rounded, -INFINITY) : rounded);
  }

  static T threshold_of(const NearestCodeProblem& p, const T* maxima, double slack) {
    const int64_t stride = num_groups(p) * kLanes;
    Vec best = Vec::load(maxima);
    for (int64_t g = kLanes; g < stride; g += kLanes) best = Vec::max(best, Vec::load(maxima + g));
    return round_down(static_cast<double>(best.reduce_max()) - slack);
  }

  // y·e_k + o_k once more, along the row: another order of the same sum, within the same bound.
  static T score_again(const NearestCodeProblem& p, const T* row, int64_t k) {
    const int64_t width = padded_width(p.D);
    const float* code = p.codes + k * width;
    Vec sum = Vec::broadcast(T(0));
    for (int64_t d = 0; d < width; d += kLanes) {
      const Vec element = Vec::sub(Vec::load_floats(code + d), Vec::load_floats(p.center + d));
      sum = Vec::fma(Vec::load(row + d), element, sum);
    }
    return sum.reduce_add() + static_cast<T>(p.offsets[k]);
  }

  // Kept codes that may be the answer, ascending within a (group, lane); -1 where they are too
  // many.
  static int candidates(const NearestCodeProblem& p, const T* row, const T* maxima, T threshold,
                        int64_t* found) {
    const int64_t groups = num_groups(p), per_group = panels_per_group(p);
    const Vec least = Vec::broadcast(threshold);
    int count = 0, hits = 0;
    for (int64_t g = 0; g < groups; ++g) {
      uint32_t lanes = Vec::at_least(Vec::load(maxima + g * kLanes), least);
      for (; lanes != 0; lanes &= lanes - 1) {
        if (++hits > kMaxHits) return -1;
        const int64_t first = g * per_group * kPanel + __builtin_ctz(lanes);
        const int64_t end = first + per_group * kPanel;
        for (int64_t k = first; k < end && k < p.num_codes; k += kLanes) {
          if (score_again(p, row, k) < threshold) continue;
          if (count == kMaxCandidates) return -1;
          found[count++] = k;
        }
      }
    }
    return count;
  }

  // ---- step 3: canonical scores
  // ---

  // Canonical scores of kTileRows rows and one panel, one code per lane: each lane adds in the
  // order d = 0 … D-1. Per row and lane, best and at keep the least cost (L2: the score, dot: its
  // negative) and the first code that has it.
  template <int kMetric>
  static void canonical_tile(const T* codes, const T* const* rows, int64_t D, int64_t first,
                             T* const* best, T* const* at) {
    Vec sum[kTileRows][kVectors];
#pragma GCC unroll 16
    for (int64_t r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 16
      for (int64_t v = 0; v < kVectors; ++v) sum[r][v] = Vec::broadcast(T(0));
    }
    for (int64_t d = 0; d < D; ++d) {
      Vec code[kVectors];
#pragma GCC unroll 16
      for (int64_t v = 0; v < kVectors; ++v) code[v] = Vec::load(codes + d * kPanel + v * kLanes);
#pragma GCC unroll 16
      for (int64_t r = 0; r < kTileRows; ++r) {
        const Vec element = Vec::broadcast(rows[r][d]);
#pragma GCC unroll 16
        for (int64_t v = 0; v < kVectors; ++v) {
          const Vec difference = Vec::sub(element, code[v]);
          sum[r][v] = kMetric == kL2 ? Vec::add(sum[r][v], Vec::mul(difference, difference))
                                     : Vec::sub(sum[r][v], Vec::mul(element, code[v]));
        }
      }
    }
    T lanes[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] = static_cast<T>(first + l);
#pragma GCC unroll 16
    for (int64_t r = 0; r < kTileRows; ++r) {
      Vec least = Vec::load(best[r]), place = Vec::load(at[r]), here = Vec::load(lanes);
#pragma GCC unroll 16
      for (int64_t v = 0; v < kVectors; ++v) {
        Vec::keep_less(sum[r][v], here, least, place);
        here = Vec::add(here, Vec::broadcast(static_cast<T>(kLanes)));
      }
      least.store(best[r]);
      place.store(at[r]);
    }
  }

  // The canonical winners of the rows left as kHardRow, among all codes of the groups whose maximum
  // reaches the row's threshold. Panel by panel, so that each is read once for all rows.
  static void settle_by_groups(const NearestCodeProblem& p, const T* panels, const int64_t* listed,
                               int64_t count, int64_t* kept, Scratch& s) {
    const int64_t group_codes = panels_per_group(p) * kPanel, stride = num_groups(p) * kLanes;
    const int64_t width = padded_width(p.D);
    int64_t hard[kBlockRows], num_hard = 0;
    T best[kTileBlock * kLanes], at[kTileBlock * kLanes], spare[2 * kLanes];
    for (int64_t i = 0; i < count; ++i) {
      if (kept[i] != kHardRow) continue;
      hard[num_hard++] = i;
      read_row(p, listed[i], s.row);
      for (int64_t d = 0; d < width; ++d) s.rows[i * width + d] = static_cast<T>(s.row[d]);
      Vec::broadcast(static_cast<T>(INFINITY)).store(best + i * kLanes);
    }
    Vec::broadcast(static_cast<T>(INFINITY)).store(spare);
    for (int64_t first = 0; num_hard > 0 && first < p.num_codes; first += kPanel) {
      const T* panel = panels + first / kPanel * panel_stride(p.D) + (p.D + 1) * kPanel;
      const T* rows[kTileRows];
      T *bests[kTileRows], *places[kTileRows];
      int64_t waiting = 0;
      for (int64_t h = 0; h < num_hard || waiting > 0; ++h) {
        if (h < num_hard) {
          const int64_t i = hard[h];
          const T* maxima = s.maxima + i * stride + first / group_codes * kLanes;
          if (s.kinds[i] != kUnscored &&
              !Vec::at_least(Vec::load(maxima), Vec::broadcast(s.thresholds[i]))) {
            continue;
          }
          rows[waiting] = s.rows + i * width;
          bests[waiting] = best + i * kLanes;
          places[waiting++] = at + i * kLanes;
          if (waiting < kTileRows) continue;
        }
        for (; waiting < kTileRows; ++waiting) {
          rows[waiting] = rows[0];
          bests[waiting] = spare;
          places[waiting] = spare + kLanes;
        }
        const auto tile = p.metric == kL2 ? canonical_tile<kL2> : canonical_tile<kDot>;
        tile(panel, rows, p.D, first, bests, places);
        waiting = 0;
      }
    }
    for (int64_t h = 0; h < num_hard; ++h) {
      const int64_t i = hard[h];
      const T *costs = best + i * kLanes, *places = at + i * kLanes;
      int64_t winner = 0;
      for (int64_t l = 1; l < kLanes; ++l) {
        const bool first = costs[l] == costs[winner] && places[l] < places[winner];
        if (costs[l] < costs[winner] || first) winner = l;
      }
      kept[i] = static_cast<int64_t>(places[winner]);
    }
  }

  // Whether most groups of the rows of the first tile come into question, so that their canonical
  // scores alone would have been cheaper.
  static bool most_in_question(const NearestCodeProblem& p, const Scratch& s) {
    const int64_t stride = num_groups(p) * kLanes;
    int64_t reached = 0;
    for (int64_t i = 0; i < kTileRows; ++i) {
      const T* maxima = s.maxima + i * stride;
      const Vec least = Vec::broadcast(threshold_of(p, maxima, s.slacks[i]));
      for (int64_t g = 0; g < stride; g += kLanes) {
        reached += Vec::at_least(Vec::load(maxima + g), least) != 0;
      }
    }
    return reached * kLanes * 2 > kTileRows * stride;
  }

  // ---- one row, one block
  // -------------------------------------------------------------------------

  // The kept code nearest to row i of the block (row n of x), or kHardRow where too many come into
  // question.
  static int64_t settle(const NearestCodeProblem& p, int64_t n, int64_t i, Scratch& s) {
    const int64_t stride = num_groups(p) * kLanes;
    const T* row = s.rows + i * padded_width(p.D);
    const T* maxima = s.maxima + i * stride;
    if (s.kinds[i] != kOrdinary) return kHardRow;
    const T threshold = threshold_of(p, maxima, s.slacks[i]);
    int64_t found[kMaxCandidates];
    const int count = candidates(p, row, maxima, threshold, found);
    if (count == 1) return found[0];
    s.thresholds[i] = threshold;
    if (count < 1) return kHardRow;
    read_row(p, n, s.row);
    return best_of(p, s.row, found, count);
  }

  static int64_t search(const NearestCodeProblem& p, const void* packed, const int64_t* rows,
                        int64_t first_row, int64_t count, void* memory) {
    const T* panels = static_cast<const T*>(packed);
    const int64_t width = padded_width(p.D);
    Scratch s;
    s.maxima = static_cast<T*>(memory);
    s.rows = s.maxima + kTileBlock * num_groups(p) * kLanes;
    s.row = reinterpret_cast<float*>(s.rows + kTileBlock * width);
    for (int64_t i = 0; i < count; ++i) load_row(p, rows ? rows[i] : first_row + i, i, s);
    const int64_t tiles_end = (count + kTileRows - 1) / kTileRows * kTileRows;
    memset(s.rows + count * width, 0, static_cast<size_t>((tiles_end - count) * width) * sizeof(T));
    const int64_t tried = !kIsFloat && count > 4 * kTileRows ? kTileRows : 0;
    score_rows(p, panels, 0, tried, s);
    if (tried > 0 && most_in_question(p, s)) {
      for (int64_t i = tried; i < count; ++i) {
        if (s.kinds[i] == kOrdinary) s.kinds[i] = kUnscored;
      }
    } else {
      score_rows(p, panels, tried, count, s);
    }
    int64_t listed[kBlockRows], kept[kBlockRows];
    for (int64_t i = 0; i < count; ++i) {
      listed[i] = rows ? rows[i] : first_row + i;
      kept[i] = s.kinds[i] == kNotFinite ? -1 : settle(p, listed[i], i, s);
    }
    if constexpr (!kIsFloat) settle_by_groups(p, panels, listed, count, kept, s);
    for (int64_t i = 0; i < count; ++i) {
      p.indices[listed[i]] = kept[i] >= 0 ? p.code_ids[kept[i]] : kept[i];
    }
    if (p.distance != nullptr) write_distances(p, listed, kept, count, s.row);
    return 0;
  }

  static bool fits(const NearestCodeProblem&) { return true; }

  static constexpr NearestCodeSearch table(double cycles) {
    return {cycles, fits, panel_bytes, scratch_bytes, pack, search};
  }
};

}  // namespace
}  // namespace fastvq
