// How the convolutions over live taps share their work out: blocks of pixels, tasks that whichever
// worker is free takes, scratch memory.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "masked_conv_kernel.h"
#include "threads.h"

namespace fastvq {

constexpr int64_t kLeastPixels = 32;
constexpr int64_t kTasksOfWorker = 4;
// Multiply-adds in the time in which useful_threads counts one.
constexpr double kMultiplyAdds = 16;

class ConvScratch {
 public:
  explicit ConvScratch(int64_t floats) {
    const size_t bytes = static_cast<size_t>(std::max<int64_t>(floats, 1)) * sizeof(float);
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, bytes) != 0) throw std::bad_alloc();
    memory_.reset(static_cast<float*>(memory));
  }
  float* get() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  std::unique_ptr<float, Free> memory_;
};

// Calls body(worker, task) for every task, each by whichever worker is free.
template <class Body>
void over_tasks(int64_t tasks, int workers, const Body& body) {
  std::atomic<int64_t> next{0};
  run_workers(workers, [&](int worker) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      body(worker, task);
    }
  });
}

// B pictures of H × W pixels cut into blocks of at most `pixels` pixels: some rows, or a part of
// one.
class ConvBlocks {
 public:
  ConvBlocks(int64_t B, int64_t H, int64_t W, int64_t pixels) : B_(B), H_(H), W_(W) {
    pixels = std::max(pixels, kLeastPixels);
    const int64_t rows = std::min(std::max<int64_t>(pixels / W, 1), kMostRows);
    parts_of_rows_ = (H + rows - 1) / rows;
    parts_of_columns_ = W > pixels ? (W + pixels - 1) / pixels : 1;
  }
  int64_t count() const { return B_ * parts_of_rows_ * parts_of_columns_; }
  ConvBlock operator[](int64_t index) const {
    const int64_t column = index % parts_of_columns_, rest = index / parts_of_columns_;
    const int64_t row = rest % parts_of_rows_;
    const int64_t top = H_ * row / parts_of_rows_;
    const int64_t left = W_ * column / parts_of_columns_;
    return {rest / parts_of_rows_, top, H_ * (row + 1) / parts_of_rows_ - top, left,
            W_ * (column + 1) / parts_of_columns_ - left};
  }
  // No block is larger.
  ConvBlock largest() const {
    return {0, 0, (H_ + parts_of_rows_ - 1) / parts_of_rows_, 0,
            (W_ + parts_of_columns_ - 1) / parts_of_columns_};
  }

 private:
  int64_t B_, H_, W_;
  int64_t parts_of_rows_, parts_of_columns_;
};

inline int workers_for(const ConvProblem& problem, int num_threads) {
  double of_pixel = static_cast<double>(problem.C + problem.O);
  for (int64_t i = 0; i < problem.num_taps; ++i) {
    const ConvTap& tap = problem.taps[i];
    of_pixel += static_cast<double>((tap.last - tap.first) * problem.O) / kMultiplyAdds;
  }
  return useful_threads(num_threads,
                        of_pixel * static_cast<double>(problem.B * problem.H * problem.W));
}

}  // namespace fastvq
