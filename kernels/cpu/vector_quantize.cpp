// See vector_quantize.h. A worker owns a range of rows (for the codebook's gradient, of codes).
// Nothing is allocated beside the search's own scratch and, for the codebook's gradient, the rows'
// numbers sorted by code.
#include "vector_quantize.h"

#include "rows.h"
#include "rows_by_code.h"
#include "threads.h"

namespace fastvq {
void vector_quantize(const NearestCodeKernel& kernel, const RowPasses& passes,
                     const CodedRows& rows, int64_t books, const uint8_t* mask, int64_t mask_rows,
                     int metric, void* quantized, int64_t* indices, float* distance,
                     int num_threads) {
  for (int64_t book = 0; book < books; ++book) {
    const int64_t first = book * rows.rows_per_book;
    const char* x =
        static_cast<const char*>(rows.x) + first * rows.D * bytes_of_element(rows.x_dtype);
    const char* codes = static_cast<const char*>(rows.codebook) +
                        book * rows.K * rows.D * bytes_of_element(rows.codebook_dtype);
    const NearestCodeCall call = {x,
                                  rows.x_dtype,
                                  codes,
                                  rows.codebook_dtype,
                                  indices + first,
                                  nullptr,
                                  rows.rows_per_book,
                                  rows.K,
                                  rows.D,
                                  metric};
    nearest_code(kernel, call, num_threads, kAllSearches);
  }
  over_rows(books * rows.rows_per_book, rows.D, num_threads, [&](int64_t first, int64_t last) {
    passes.gather(rows, mask, mask_rows, indices, quantized, distance, first, last);
  });
}

void vector_quantize_backward_x(const RowPasses& passes, const CodedRows& rows, int64_t N,
                                const int64_t* indices, const void* grad_quantized,
                                const float* grad_distance, int64_t stride, bool rotation,
                                void* grad_x, int num_threads) {
  over_rows(N, rows.D, num_threads, [&](int64_t first, int64_t last) {
    passes.backward(rows, indices, grad_quantized, grad_distance, stride, rotation, grad_x, first,
                    last);
  });
}

void vector_quantize_backward_codebook(const RowPasses& passes, const CodedRows& rows, int64_t N,
                                       const int64_t* indices, const float* grad_distance,
                                       int64_t stride, float* grad_codebook, int num_threads) {
  const RowsByCode by_code("vector_quantize", indices, N, rows.rows_per_book, rows.K);
  by_code.visit(rows.D, num_threads, [&](int64_t code, int64_t first, int64_t last) {
    passes.sum_pulls(rows, by_code.of(code), by_code.rows(code), first, last,
                     grad_codebook + code * rows.D, code, grad_distance, stride);
  });
}

}  // namespace fastvq
