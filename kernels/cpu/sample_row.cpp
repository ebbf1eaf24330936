// See sample_row.h.
#include "sample_row.h"

#include <algorithm>
#include <vector>

#include "threads.h"

namespace fastvq {
namespace {

int64_t draw_range(SampleRowKernel kernel, const SampleRowProblem& problem, int64_t first,
                   int64_t last, int64_t start) {
  const int64_t count = last - first;
  const int64_t widest = std::max({3 * problem.channels, problem.hidden, problem.K});
  const int64_t wide = (widest + kPanel - 1) / kPanel * kPanel;
  const int64_t narrow = std::max(problem.channels, problem.hidden);
  std::vector<float> product(static_cast<size_t>(count * wide));
  std::vector<float> features(static_cast<size_t>(count * narrow)), hidden(features.size());
  std::vector<float> scores(static_cast<size_t>(problem.H * problem.W));
  CodeDrawer drawer(problem.rule, problem.K);
  std::fill_n(problem.doubtful + first, count, uint8_t{0});
  const SampleRowScratch scratch = {product.data(), features.data(), hidden.data(), scores.data(),
                                    wide};
  return kernel(problem, scratch, drawer, first, last, start);
}

}  // namespace

void sample_row(SampleRowKernel kernel, const SampleRowProblem& problem, int64_t* columns,
                int64_t blocks) {
  run_workers(static_cast<int>(blocks), [&](int worker) {
    const int64_t first = problem.n * worker / blocks, last = problem.n * (worker + 1) / blocks;
    if (columns[worker] < problem.W) {
      columns[worker] = draw_range(kernel, problem, first, last, columns[worker]);
    }
  });
}

}  // namespace fastvq
