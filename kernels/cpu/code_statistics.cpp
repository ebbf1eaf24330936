// See code_statistics.h. Each worker owns a range of channels and walks all rows: a code that owns
// most rows slows nobody down, and no two workers write one number. On the chip stay one row's
// slice and the rows of the (K, D) float64 sums in use; nothing of size N×K exists.
#include "code_statistics.h"

#include <stdexcept>
#include <string>
#include <vector>

#include "rows.h"
#include "threads.h"

namespace fastvq {
namespace {

void check_and_count(const int64_t* indices, int64_t N, int64_t K, float* counts) {
  std::vector<int64_t> rows(static_cast<size_t>(K), 0);
  for (int64_t n = 0; n < N; ++n) {
    const int64_t k = indices[n];
    if (k >= 0 && k < K) {
      ++rows[static_cast<size_t>(k)];
    } else if (k != -1) {
      throw std::invalid_argument("code_statistics: indices must lie in -1 … " +
                                  std::to_string(K - 1) + " for " + std::to_string(K) +
                                  " codes; got " + std::to_string(k) + " at row " +
                                  std::to_string(n) + ".");
    }
  }
  for (int64_t k = 0; k < K; ++k) counts[k] = static_cast<float>(rows[static_cast<size_t>(k)]);
}

// The channels first … last-1 of the sums.
template <class Element>
void sum_channels(const Element* x, const int64_t* indices, double* totals, float* sums, int64_t N,
                  int64_t K, int64_t D, int64_t first, int64_t last) {
  for (int64_t n = 0; n < N; ++n) {
    if (indices[n] < 0) continue;
    const Element* row = x + n * D;
    double* total = totals + indices[n] * D;
    for (int64_t d = first; d < last; ++d) total[d] += static_cast<double>(to_float(row[d]));
  }
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t d = first; d < last; ++d) sums[k * D + d] = static_cast<float>(totals[k * D + d]);
  }
}

}  // namespace

void code_statistics(const void* x, int x_dtype, const int64_t* indices, float* counts, float* sums,
                     int64_t N, int64_t K, int64_t D, int num_threads) {
  check_and_count(indices, N, K, counts);
  std::vector<double> totals(static_cast<size_t>(K * D), 0.0);
  int workers = useful_threads(num_threads, static_cast<double>(N) * static_cast<double>(D));
  if (workers > D) workers = static_cast<int>(D);
  run_workers(workers, [&](int worker) {
    const int64_t first = D * worker / workers, last = D * (worker + 1) / workers;
    double* total = totals.data();
    if (x_dtype == kFloat32) {
      sum_channels(static_cast<const float*>(x), indices, total, sums, N, K, D, first, last);
    } else if (x_dtype == kFloat16) {
      sum_channels(static_cast<const Half*>(x), indices, total, sums, N, K, D, first, last);
    } else {
      sum_channels(static_cast<const BFloat*>(x), indices, total, sums, N, K, D, first, last);
    }
  });
}

}  // namespace fastvq
