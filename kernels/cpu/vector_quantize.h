// The nearest code row of each row, its squared distance, and the gradients of VQ-VAE.
#pragma once

#include <cstdint>

#include "nearest_code.h"
#include "row_passes.h"

namespace fastvq {

// indices as nearest_code's; quantized[n] is the chosen code row (of codebook_dtype), distance[n]
// = Σ_d (x-q)² added in float32. A row without a nearest code gets NaN in both. A row n (of its
// book) with mask[n % mask_rows] = 0 gets index -1, zeros and 0; mask may be null.
// rows: x (books · rows_per_book, D), codebook (books, K, D), all contiguous.
void vector_quantize(const NearestCodeKernel& kernel, const RowPasses& passes,
                     const CodedRows& rows, int64_t books, const uint8_t* mask, int64_t mask_rows,
                     int metric, void* quantized, int64_t* indices, float* distance,
                     int num_threads);

// grad_x[n] = J(grad_quantized[n]) + 2·grad_distance[n·stride]·(x-q); see RowPasses::backward.
void vector_quantize_backward_x(const RowPasses& passes, const CodedRows& rows, int64_t N,
                                const int64_t* indices, const void* grad_quantized,
                                const float* grad_distance, int64_t stride, bool rotation,
                                void* grad_x, int num_threads);

// grad_codebook[k] = Σ_{n : indices[n] = k} 2·grad_distance[n·stride]·(q-x), each term in float32,
// added in float64 in row order and rounded to float32 once. grad_codebook: (books, K, D).
void vector_quantize_backward_codebook(const RowPasses& passes, const CodedRows& rows, int64_t N,
                                       const int64_t* indices, const float* grad_distance,
                                       int64_t stride, float* grad_codebook, int num_threads);

}  // namespace fastvq
