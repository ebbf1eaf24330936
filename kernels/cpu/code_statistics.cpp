// See code_statistics.h. A worker owns some codes, or some channels of a code that has many rows,
// and visits their rows in order, a block of channels in registers. Besides the results, memory
// holds the rows' numbers sorted by code; nothing of size N×K or K×D.
#include "code_statistics.h"

#include "rows_by_code.h"

namespace fastvq {

void code_statistics(const RowPasses& passes, const void* x, int x_dtype, const int64_t* indices,
                     float* counts, float* sums, int64_t books, int64_t N, int64_t K, int64_t D,
                     int num_threads) {
  const RowsByCode by_code("code_statistics", indices, books * N, N, K);
  const CodedRows rows{x, x_dtype, nullptr, 0, N, K, D};
  by_code.visit(D, num_threads, [&](int64_t code, int64_t first, int64_t last) {
    if (first == 0) counts[code] = static_cast<float>(by_code.rows(code));
    passes.sum(rows, by_code.of(code), by_code.rows(code), first, last, sums + code * D);
  });
}

}  // namespace fastvq
