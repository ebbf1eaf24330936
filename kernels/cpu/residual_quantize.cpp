// See residual_quantize.h. Each level searches all rows before the next one starts, so a codebook
// is prepared once a call and stays in the cache while rows stream past it; taking a block of rows
// through all levels instead would stream every level's codebook past each block, which is more
// memory for all but the smallest codebooks. Memory holds the float32 residuals, the indices of one
// level, and the search's own scratch; the first level reads x itself.
#include "residual_quantize.h"

#include <vector>

#include "rows.h"
#include "threads.h"

namespace fastvq {

void residual_quantize(const NearestCodeKernel& kernel, const RowPasses& passes, const void* x,
                       int x_dtype, const void* codebooks, int codebook_dtype, void* quantized,
                       int64_t* indices, int64_t N, int64_t Q, int64_t K, int64_t D,
                       int num_threads) {
  std::vector<float> residual(static_cast<size_t>(Q > 1 ? N * D : 0));
  std::vector<int64_t> level(static_cast<size_t>(N));
  CodedRows rows{x, x_dtype, codebooks, codebook_dtype, N, K, D};
  for (int64_t q = 0; q < Q; ++q) {
    rows.codebook =
        static_cast<const char*>(codebooks) + q * K * D * bytes_of_element(codebook_dtype);
    const NearestCodeCall call = {
        rows.x, rows.x_dtype, rows.codebook, codebook_dtype, level.data(), nullptr, N, K, D, kL2};
    nearest_code(kernel, call, num_threads, kAllSearches);
    for (int64_t n = 0; n < N; ++n) indices[n * Q + q] = level[static_cast<size_t>(n)];
    if (q + 1 == Q) break;
    over_rows(N, D, num_threads, [&](int64_t first, int64_t last) {
      passes.subtract(rows, level.data(), residual.data(), first, last);
    });
    rows.x = residual.data();
    rows.x_dtype = kFloat32;
  }
  rows.codebook = codebooks;
  over_rows(N, Q * D, num_threads, [&](int64_t first, int64_t last) {
    passes.add_up(rows, indices, Q, quantized, first, last);
  });
}

}  // namespace fastvq
