// Rows listed by the code they chose, and the work of visiting them spread over threads.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "row_passes.h"
#include "threads.h"

namespace fastvq {

// A stable counting sort: the rows of code k, in row order, are order[start[k]] …
// order[start[k+1]-1]. Codes are numbered through the books: book · K + index. Index -1 is left
// out.
class RowsByCode {
 public:
  // Throws std::invalid_argument, on behalf of `op`, for an index outside -1 … K-1.
  RowsByCode(const char* op, const int64_t* indices, int64_t N, int64_t rows_per_book, int64_t K);

  int64_t num_codes() const { return static_cast<int64_t>(start_.size()) - 1; }
  int64_t rows(int64_t code) const { return start_[at(code + 1)] - start_[at(code)]; }
  const int64_t* of(int64_t code) const { return order_.data() + start_[at(code)]; }

  // Calls visit(code, first channel, last channel) for every code, every channel once, on up to
  // num_threads threads. A code with many rows is shared out by blocks of channels, so that one
  // code that owns most rows does not leave the other threads idle.
  template <class Visit>
  void visit(int64_t D, int num_threads, const Visit& visit) const {
    const int workers =
        threads_for_rows(num_threads, static_cast<int64_t>(order_.size()) + num_codes(), D);
    const std::vector<Task> tasks = shared_out(D, workers);
    std::atomic<size_t> next{0};
    run_workers(workers, [&](int) {
      for (size_t i = next++; i < tasks.size(); i = next++) {
        const Task& task = tasks[i];
        for (int64_t code = task.first_code; code < task.last_code; ++code) {
          visit(code, task.first_channel, task.last_channel);
        }
      }
    });
  }

 private:
  struct Task {
    int64_t first_code, last_code, first_channel, last_channel;
  };

  static size_t at(int64_t number) { return static_cast<size_t>(number); }
  std::vector<Task> shared_out(int64_t D, int workers) const;

  std::vector<int64_t> start_, order_;
};

}  // namespace fastvq
