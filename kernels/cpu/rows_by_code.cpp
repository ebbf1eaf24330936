// See rows_by_code.h.
#include "rows_by_code.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace fastvq {

RowsByCode::RowsByCode(const char* op, const int64_t* indices, int64_t N, int64_t rows_per_book,
                       int64_t K) {
  const int64_t books = rows_per_book > 0 ? N / rows_per_book : 1;
  start_.assign(at(books * K + 1), 0);
  for (int64_t n = 0, book = 0; book < books; ++book) {
    int64_t* rows = start_.data() + book * K + 1;
    for (const int64_t end = n + rows_per_book; n < end; ++n) {
      const int64_t k = indices[n];
      if (k >= 0 && k < K) {
        ++rows[k];
      } else if (k != -1) {
        throw std::invalid_argument(std::string(op) + ": indices must be −1 or in 0 … " +
                                    std::to_string(K - 1) + "; got " + std::to_string(k) +
                                    " at row " + std::to_string(n) + ". Are there really " +
                                    std::to_string(K) + " codes?");
      }
    }
  }
  for (size_t code = 1; code < start_.size(); ++code) start_[code] += start_[code - 1];
  order_.resize(at(start_.back()));
  // Writing moves each code's start to its end, which is the next one's start.
  for (int64_t n = 0, book = 0; book < books; ++book) {
    int64_t* start = start_.data() + book * K;
    for (const int64_t end = n + rows_per_book; n < end; ++n) {
      if (indices[n] >= 0) order_[at(start[indices[n]]++)] = n;
    }
  }
  std::copy_backward(start_.begin(), start_.end() - 1, start_.end());
  start_[0] = 0;
}

std::vector<RowsByCode::Task> RowsByCode::shared_out(int64_t D, int workers) const {
  const int64_t codes = num_codes();
  if (workers == 1) return {{0, codes, 0, D}};
  // Several tasks a thread: who is done early takes more. A code costs at least its writing.
  const int64_t share = (static_cast<int64_t>(order_.size()) + codes) / (4 * workers) + 1;
  std::vector<Task> tasks;
  int64_t first = 0, work = 0;
  const auto close = [&](int64_t end) {
    if (first < end) tasks.push_back({first, end, 0, D});
    first = end;
    work = 0;
  };
  for (int64_t code = 0; code < codes; ++code) {
    if (rows(code) > share && D > kChannelBlock) {
      close(code);
      for (int64_t d = 0; d < D; d += kChannelBlock) {
        tasks.push_back({code, code + 1, d, std::min(D, d + kChannelBlock)});
      }
      first = code + 1;
    } else if ((work += rows(code) + 1) >= share) {
      close(code + 1);
    }
  }
  close(codes);
  return tasks;
}

}  // namespace fastvq
