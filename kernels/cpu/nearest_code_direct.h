// The search for a few rows under L2: Σ (x-c)² in float32 straight from the caller's codebook, for
// packing it would cost more than the search. Bound and canonical scores are
// nearest_code_rescore.h's; internal linkage as there.
//
// A call owns all rows. In the caches: one row and four codes. Never written: more than one row's
// scores.
#pragma once

#include <math.h>
#include <stdint.h>

#include "nearest_code.h"
#include "nearest_code_rescore.h"
#include "rows.h"

namespace fastvq {
namespace {

template <class Vec>
struct Direct {
  static constexpr int kMaxCandidates = 64;

  // Four rows of the codebook as padded float32 rows: its own where they have that form.
  static void four_codes(const NearestCodeCall& call, int64_t first, float* buffer,
                         const float** codes) {
    const int64_t D = call.D, width = padded_width(D);
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t k = first + i < call.K ? first + i : first;
      if (call.codebook_dtype == kFloat32 && width == D) {
        codes[i] = static_cast<const float*>(call.codebook) + k * D;
      } else {
        read_floats(call.codebook, call.codebook_dtype, k * D, D, buffer + i * width);
        codes[i] = buffer + i * width;
      }
    }
  }

  // Whether row n could be settled; scratch as in search.
  static bool settle(const NearestCodeCall& call, int64_t n, float* scratch) {
    const int64_t D = call.D, K = call.K, width = padded_width(D);
    float *row = scratch, *buffer = row + width, *costs = buffer + 4 * width;
    read_floats(call.x, call.x_dtype, n * D, D, row);
    const float* codes[4];
    float least = INFINITY;
    for (int64_t k = 0; k < K; k += 4) {
      four_codes(call, k, buffer, codes);
      direct_scores<Vec>(row, codes, width, kL2, costs + k);
      for (int64_t j = k; j < k + 4; ++j) least = costs[j] < least ? costs[j] : least;
    }
    // Also where the row, or every code, is not finite: the other searches tell these apart.
    if (!(least < 0x1p120f)) return false;
    const double threshold = direct_threshold(static_cast<double>(least), 0.0, D, kL2);
    int64_t winner = -1, candidates = 0;
    double best = 0.0;
    for (int64_t k = 0; k < K; ++k) {
      // No sum that may win has overflowed: NaN is a code's own, and loses.
      if (!(static_cast<double>(costs[k]) <= threshold)) continue;
      if (++candidates > kMaxCandidates) return false;
      read_floats(call.codebook, call.codebook_dtype, k * D, D, buffer);
      const double score = canonical_score(row, buffer, D, kL2);
      if (winner < 0 || score < best) {
        winner = k;
        best = score;
      }
    }
    call.indices[n] = winner;
    if (call.distance != nullptr) call.distance[n] = static_cast<float>(best);
    return true;
  }

  // Floats of scratch; the caller has zeroed them.
  static int64_t scratch_floats(const NearestCodeCall& call) {
    return 5 * padded_width(call.D) + call.K + 4;
  }

  // Settles all rows, or says that it cannot.
  static bool search(const NearestCodeCall& call, float* scratch) {
    for (int64_t n = 0; n < call.N; ++n) {
      if (!settle(call, n, scratch)) return false;
    }
    return true;
  }

  static constexpr NearestCodeDirect table() { return {scratch_floats, search}; }
};

}  // namespace
}  // namespace fastvq
