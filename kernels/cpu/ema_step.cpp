// See ema_step.h. The counts of a book, K numbers, are moved by one thread, for their total is
// every code's divisor. Then a worker owns some codes: each is read and written once. Nothing of
// size K×D is allocated: the sum of a code's rows is made where its code will be.
#include "ema_step.h"

#include <cmath>
#include <vector>

#include "rows_by_code.h"
#include "threads.h"

namespace fastvq {
namespace {

constexpr float kLargestSum = 0x1p125f;

// The end that is nearer is the one that is moved from: a weight of 0 or 1 gives an end exactly.
inline double moved(double from, double to, double weight) {
  return weight < 0.5 ? from + weight * (to - from) : to - (1.0 - weight) * (to - from);
}

// Moves the counts of one book. Returns ΣN / (ΣN + Kε), or 0 where no row counts.
double move_counts(const MovingAverages& averages, int64_t book, const float* counts) {
  const float* batch = counts + book * averages.K;
  float* average = averages.counts + book * averages.K;
  bool some = false;
  for (int64_t k = 0; k < averages.K; ++k) some |= batch[k] > 0.0f;
  if (!some) return 0.0;
  double total = 0.0;
  for (int64_t k = 0; k < averages.K; ++k) {
    average[k] = static_cast<float>(moved(average[k], batch[k], 1.0 - averages.decay));
    total += average[k];
  }
  return total / (total + static_cast<double>(averages.K) * averages.eps);
}

// sums and codes may be the same memory.
void move_sums(const float* sums, double weight, double scale, int64_t count, float* average,
               float* codes) {
  for (int64_t d = 0; d < count; ++d) {
    const float least = sums[d] > -kLargestSum ? sums[d] : -kLargestSum;
    const float sum = least < kLargestSum ? least : kLargestSum;
    average[d] = static_cast<float>(moved(average[d], sum, weight));
    if (codes != nullptr) codes[d] = static_cast<float>(average[d] * scale);
  }
}

void move_code(const MovingAverages& averages, double share, int64_t code, const float* sums,
               int64_t first, int64_t last) {
  const int64_t offset = code * averages.D + first;
  const double smoothed = (averages.counts[code] + averages.eps) * share;
  move_sums(sums, 1.0 - averages.decay, 1.0 / smoothed, last - first, averages.sums + offset,
            averages.codes == nullptr ? nullptr : averages.codes + offset);
}

void make_unit(float* code, int64_t D) {
  double squares = 0.0;
  for (int64_t d = 0; d < D; ++d) squares += static_cast<double>(code[d]) * code[d];
  const double length = std::sqrt(squares);
  const double scale = 1.0 / (length > 1e-6 ? length : 1e-6);
  for (int64_t d = 0; d < D; ++d) code[d] = static_cast<float>(code[d] * scale);
}

std::vector<double> move_all_counts(const MovingAverages& averages, const float* counts) {
  std::vector<double> shares(static_cast<size_t>(averages.books));
  for (int64_t book = 0; book < averages.books; ++book) {
    shares[static_cast<size_t>(book)] = move_counts(averages, book, counts);
  }
  return shares;
}

}  // namespace

void ema_step(const MovingAverages& averages, const float* counts, const float* sums,
              int num_threads) {
  const int64_t K = averages.K, D = averages.D;
  const std::vector<double> shares = move_all_counts(averages, counts);
  over_rows(averages.books * K, D, num_threads, [&](int64_t first, int64_t last) {
    for (int64_t code = first; code < last; ++code) {
      const double share = shares[static_cast<size_t>(code / K)];
      if (share == 0.0) continue;
      move_code(averages, share, code, sums + code * D, 0, D);
      if (averages.unit && averages.codes != nullptr) make_unit(averages.codes + code * D, D);
    }
  });
}

void ema_step_of_rows(const RowPasses& passes, const MovingAverages& averages, const void* x,
                      int x_dtype, const int64_t* indices, int64_t N, float* counts,
                      int num_threads) {
  const int64_t K = averages.K, D = averages.D;
  const RowsByCode by_code("ema_step", indices, averages.books * N, N, K);
  for (int64_t code = 0; code < averages.books * K; ++code) {
    counts[code] = N > 0 ? static_cast<float>(by_code.rows(code)) : 0.0f;
  }
  if (N == 0) return;
  const std::vector<double> shares = move_all_counts(averages, counts);
  const CodedRows rows{x, x_dtype, nullptr, 0, N, K, D};
  by_code.visit(D, num_threads, [&](int64_t code, int64_t first, int64_t last) {
    const double share = shares[static_cast<size_t>(code / K)];
    if (share == 0.0) return;
    float* sums = averages.codes + code * D;
    passes.sum(rows, by_code.of(code), by_code.rows(code), first, last, sums);
    move_code(averages, share, code, sums + first, first, last);
  });
  if (!averages.unit) return;
  over_rows(averages.books * K, D, num_threads, [&](int64_t first, int64_t last) {
    for (int64_t code = first; code < last; ++code) {
      if (shares[static_cast<size_t>(code / K)] > 0.0) make_unit(averages.codes + code * D, D);
    }
  });
}

}  // namespace fastvq
