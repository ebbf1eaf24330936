// One pass over rows and the codes chosen for them: what the ops do beside the search. Compiled
// once per instruction set (row_passes_*.cpp); the results are the same to the bit on all of them.
#pragma once

#include <cstdint>

namespace fastvq {

// Rows and their codebooks. Row n belongs to codebook n / rows_per_book.
struct CodedRows {
  const void* x;  // (N, D) contiguous, of x_dtype (rows.h)
  int x_dtype;
  const void* codebook;  // (books, K, D) contiguous
  int codebook_dtype;
  int64_t rows_per_book, K, D;
};

struct RowPasses {
  // Of the rows first … last-1: the chosen code row, and Σ_d (x-q)² added in float32. Index -1
  // gives NaN; a row whose mask[n % mask_rows] is 0 gives index -1, zeros and 0. mask may be null.
  void (*gather)(const CodedRows& rows, const uint8_t* mask, int64_t mask_rows, int64_t* indices,
                 void* quantized, float* distance, int64_t first, int64_t last);
  // grad_x[n] = J(grad_quantized[n]) + 2·grad_distance[n·stride]·(x-q), J the identity or the
  // rotation's transpose; index -1 gives zeros. Either gradient may be null: none.
  // grad_quantized has codebook_dtype, grad_x has x_dtype.
  void (*backward)(const CodedRows& rows, const int64_t* indices, const void* grad_quantized,
                   const float* grad_distance, int64_t stride, bool rotation, void* grad_x,
                   int64_t first, int64_t last);
  // sums[d] = Σ_i of x[order[i], d] for first ≤ d < last (a multiple of kChannelBlock, or D), added
  // in float64 in that order and rounded once.
  void (*sum)(const CodedRows& rows, const int64_t* order, int64_t count, int64_t first,
              int64_t last, float* sums);
  // As `sum`, of 2·weight[order[i]·stride]·(code - x[order[i]]), each term in float32.
  void (*sum_pulls)(const CodedRows& rows, const int64_t* order, int64_t count, int64_t first,
                    int64_t last, float* sums, int64_t code, const float* weight, int64_t stride);
  // residual[n] = x[n] - its code row, in float32; index -1 gives NaN. residual may be x.
  void (*subtract)(const CodedRows& rows, const int64_t* indices, float* residual, int64_t first,
                   int64_t last);
  // quantized[n] = Σ_q codebook[q, indices[n, q]], added in that order in float32 and rounded once;
  // a -1 among them gives NaN. codebook is (Q, K, D) here, indices (N, Q); x is not read.
  void (*add_up)(const CodedRows& rows, const int64_t* indices, int64_t Q, void* quantized,
                 int64_t first, int64_t last);
};

extern const RowPasses row_passes_generic, row_passes_avx2, row_passes_avx512;

// Channels that one call of `sum` keeps in registers: whole cache lines of any dtype.
constexpr int64_t kChannelBlock = 32;

}  // namespace fastvq
