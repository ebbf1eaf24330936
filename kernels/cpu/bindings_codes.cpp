// Calls of the extension module around codes: search, quantization, statistics and averages.
// Tensors arrive as addresses and sizes: the caller (fastvq/ops) has checked shapes, types and
// strides and keeps them alive.
#include "bindings.h"
#include "code_statistics.h"
#include "counted_mean.h"
#include "ema_step.h"
#include "isa.h"
#include "nearest_code.h"
#include "residual_quantize.h"
#include "row_passes.h"
#include "rows.h"
#include "vector_quantize.h"

namespace bindings {
namespace {

void check_sizes(bool hold) {
  check(hold, "_fastvq_C: sizes must be N, K >= 0, D >= 1, books and num_threads >= 1.");
}

void check_metric(int metric) {
  check(metric == fastvq::kL2 || metric == fastvq::kDot,
        "_fastvq_C: metric codes are 0 (l2) and 1 (dot).");
}

fastvq::NearestCodeKernel kernel_in_use() {
  switch (fastvq::isa_in_use()) {
#if defined(__x86_64__)
    case fastvq::Isa::kAmx:
      return {&fastvq::nearest_code_int8_amx, &fastvq::nearest_code_int16_vnni,
              &fastvq::nearest_code_avx512_float32, &fastvq::nearest_code_avx512_float64,
              &fastvq::nearest_code_avx512_direct};
    case fastvq::Isa::kAvx512: {
      const bool vnni = fastvq::machine_has_vnni();
      return {vnni ? &fastvq::nearest_code_int8_vnni : nullptr,
              vnni ? &fastvq::nearest_code_int16_vnni : nullptr,
              &fastvq::nearest_code_avx512_float32, &fastvq::nearest_code_avx512_float64,
              &fastvq::nearest_code_avx512_direct};
    }
    case fastvq::Isa::kAvx2:
      return {nullptr, nullptr, &fastvq::nearest_code_avx2_float32,
              &fastvq::nearest_code_avx2_float64, &fastvq::nearest_code_avx2_direct};
#endif
    default:
      return {nullptr, nullptr, &fastvq::nearest_code_generic_float32,
              &fastvq::nearest_code_generic_float64, &fastvq::nearest_code_generic_direct};
  }
}

const fastvq::RowPasses& passes_in_use() {
  switch (fastvq::isa_in_use()) {
#if defined(__x86_64__)
    case fastvq::Isa::kAmx:
    case fastvq::Isa::kAvx512:
      return fastvq::row_passes_avx512;
    case fastvq::Isa::kAvx2:
      return fastvq::row_passes_avx2;
#endif
    default:
      return fastvq::row_passes_generic;
  }
}

PyObject* nearest_code(PyObject*, PyObject* args) {
  unsigned long long x, codebook, indices, distance;
  long long N, K, D;
  int x_dtype, codebook_dtype, metric, num_threads, searches = fastvq::kAllSearches;
  if (!PyArg_ParseTuple(args, "KiKiKKLLLii|i", &x, &x_dtype, &codebook, &codebook_dtype, &indices,
                        &distance, &N, &K, &D, &metric, &num_threads, &searches)) {
    return nullptr;
  }
  return guarded([&]() -> PyObject* {
    check_dtype(x_dtype);
    check_dtype(codebook_dtype);
    check_sizes(N >= 0 && K >= 0 && D >= 1 && num_threads >= 1);
    check_metric(metric);
    const fastvq::NearestCodeKernel kernel = kernel_in_use();
    {
      const WithoutPythonLock unlocked;
      const fastvq::NearestCodeCall call = {address<const void*>(x),
                                            x_dtype,
                                            address<const void*>(codebook),
                                            codebook_dtype,
                                            address<int64_t*>(indices),
                                            address<float*>(distance),
                                            N,
                                            K,
                                            D,
                                            metric};
      fastvq::nearest_code(kernel, call, num_threads, searches);
    }
    Py_RETURN_NONE;
  });
}

PyObject* code_statistics(PyObject*, PyObject* args) {
  unsigned long long x, indices, counts, sums;
  long long books, N, K, D;
  int x_dtype, num_threads;
  if (!PyArg_ParseTuple(args, "KiKKKLLLLi", &x, &x_dtype, &indices, &counts, &sums, &books, &N, &K,
                        &D, &num_threads)) {
    return nullptr;
  }
  return guarded([&]() -> PyObject* {
    check_dtype(x_dtype);
    check_sizes(books >= 1 && N >= 0 && K >= 0 && D >= 1 && num_threads >= 1);
    const fastvq::RowPasses& passes = passes_in_use();
    {
      const WithoutPythonLock unlocked;
      fastvq::code_statistics(passes, address<const void*>(x), x_dtype,
                              address<const int64_t*>(indices), address<float*>(counts),
                              address<float*>(sums), books, N, K, D, num_threads);
    }
    Py_RETURN_NONE;
  });
}

// State and rule as the two calls below take them: counts, sums, codes, books, K, D, decay, eps,
// unit.
#define AVERAGES_FORMAT "KKKLLLddi"
struct AveragesArguments {
  unsigned long long counts, sums, codes;
  long long books, K, D;
  double decay, eps;
  int unit;

  fastvq::MovingAverages checked(int num_threads) const {
    check_sizes(books >= 1 && K >= 0 && D >= 1 && num_threads >= 1);
    return {address<float*>(counts),
            address<float*>(sums),
            address<float*>(codes),
            books,
            K,
            D,
            decay,
            eps,
            unit != 0};
  }
};

PyObject* ema_step(PyObject*, PyObject* args) {
  AveragesArguments in;
  unsigned long long counts, sums;
  int num_threads;
  if (!PyArg_ParseTuple(args, AVERAGES_FORMAT "KKi", &in.counts, &in.sums, &in.codes, &in.books,
                        &in.K, &in.D, &in.decay, &in.eps, &in.unit, &counts, &sums, &num_threads)) {
    return nullptr;
  }
  return guarded([&]() -> PyObject* {
    const fastvq::MovingAverages averages = in.checked(num_threads);
    {
      const WithoutPythonLock unlocked;
      fastvq::ema_step(averages, address<const float*>(counts), address<const float*>(sums),
                       num_threads);
    }
    Py_RETURN_NONE;
  });
}

PyObject* ema_step_of_rows(PyObject*, PyObject* args) {
  AveragesArguments in;
  unsigned long long x, indices, counts;
  long long N;
  int x_dtype, num_threads;
  if (!PyArg_ParseTuple(args, AVERAGES_FORMAT "KiKLKi", &in.counts, &in.sums, &in.codes, &in.books,
                        &in.K, &in.D, &in.decay, &in.eps, &in.unit, &x, &x_dtype, &indices, &N,
                        &counts, &num_threads)) {
    return nullptr;
  }
  return guarded([&]() -> PyObject* {
    const fastvq::MovingAverages averages = in.checked(num_threads);
    check_dtype(x_dtype);
    check_sizes(N >= 0);
    check(in.codes != 0, "_fastvq_C: ema_step_of_rows needs codes.");
    const fastvq::RowPasses& passes = passes_in_use();
    {
      const WithoutPythonLock unlocked;
      fastvq::ema_step_of_rows(passes, averages, address<const void*>(x), x_dtype,
                               address<const int64_t*>(indices), N, address<float*>(counts),
                               num_threads);
    }
    Py_RETURN_NONE;
  });
}

// Rows and codebooks as the calls below take them: x, x_dtype, codebook, codebook_dtype, books,
// rows_per_book, K, D.
#define CODED_ROWS_FORMAT "KiKiLLLL"
struct CodedRowsArguments {
  unsigned long long x, codebook;
  int x_dtype, codebook_dtype;
  long long books, rows_per_book, K, D;

  fastvq::CodedRows checked(int num_threads) const {
    check_dtype(x_dtype);
    check_dtype(codebook_dtype);
    check_sizes(books >= 1 && rows_per_book >= 0 && K >= 0 && D >= 1 && num_threads >= 1);
    return {address<const void*>(x),
            x_dtype,
            address<const void*>(codebook),
            codebook_dtype,
            rows_per_book,
            K,
            D};
  }
  int64_t num_rows() const { return books * rows_per_book; }
};

PyObject* vector_quantize(PyObject*, PyObject* args) {
  CodedRowsArguments in;
  unsigned long long mask, quantized, indices, distance;
  long long mask_rows;
  int metric, num_threads;
  if (!PyArg_ParseTuple(args, CODED_ROWS_FORMAT "KLiKKKi", &in.x, &in.x_dtype, &in.codebook,
                        &in.codebook_dtype, &in.books, &in.rows_per_book, &in.K, &in.D, &mask,
                        &mask_rows, &metric, &quantized, &indices, &distance, &num_threads)) {
    return nullptr;
  }
  return guarded([&]() -> PyObject* {
    const fastvq::CodedRows rows = in.checked(num_threads);
    check(mask == 0 || mask_rows >= 1 || in.num_rows() == 0, "_fastvq_C: the mask has no rows.");
    check_metric(metric);
    const fastvq::NearestCodeKernel kernel = kernel_in_use();
    const fastvq::RowPasses& passes = passes_in_use();
    {
      const WithoutPythonLock unlocked;
      fastvq::vector_quantize(kernel, passes, rows, in.books, address<const uint8_t*>(mask),
                              mask_rows, metric, address<void*>(quantized),
                              address<int64_t*>(indices), address<float*>(distance), num_threads);
    }
    Py_RETURN_NONE;
  });
}

PyObject* vector_quantize_backward_x(PyObject*, PyObject* args) {
  CodedRowsArguments in;
  unsigned long long indices, grad_quantized, grad_distance, grad_x;
  long long stride;
  int rotation, num_threads;
  if (!PyArg_ParseTuple(args, CODED_ROWS_FORMAT "KKKLiKi", &in.x, &in.x_dtype, &in.codebook,
                        &in.codebook_dtype, &in.books, &in.rows_per_book, &in.K, &in.D, &indices,
                        &grad_quantized, &grad_distance, &stride, &rotation, &grad_x,
                        &num_threads)) {
    return nullptr;
  }
  return guarded([&]() -> PyObject* {
    const fastvq::CodedRows rows = in.checked(num_threads);
    const fastvq::RowPasses& passes = passes_in_use();
    {
      const WithoutPythonLock unlocked;
      fastvq::vector_quantize_backward_x(
          passes, rows, in.num_rows(), address<const int64_t*>(indices),
          address<const void*>(grad_quantized), address<const float*>(grad_distance), stride,
          rotation != 0, address<void*>(grad_x), num_threads);
    }
    Py_RETURN_NONE;
  });
}

PyObject* vector_quantize_backward_codebook(PyObject*, PyObject* args) {
  CodedRowsArguments in;
  unsigned long long indices, grad_distance, grad_codebook;
  long long stride;
  int num_threads;
  if (!PyArg_ParseTuple(args, CODED_ROWS_FORMAT "KKLKi", &in.x, &in.x_dtype, &in.codebook,
                        &in.codebook_dtype, &in.books, &in.rows_per_book, &in.K, &in.D, &indices,
                        &grad_distance, &stride, &grad_codebook, &num_threads)) {
    return nullptr;
  }
  return guarded([&]() -> PyObject* {
    const fastvq::CodedRows rows = in.checked(num_threads);
    const fastvq::RowPasses& passes = passes_in_use();
    {
      const WithoutPythonLock unlocked;
      fastvq::vector_quantize_backward_codebook(passes, rows, in.num_rows(),
                                                address<const int64_t*>(indices),
                                                address<const float*>(grad_distance), stride,
                                                address<float*>(grad_codebook), num_threads);
    }
    Py_RETURN_NONE;
  });
}

PyObject* counted_mean(PyObject*, PyObject* args) {
  unsigned long long losses, indices, mean, divisor;
  long long N, D;
  if (!PyArg_ParseTuple(args, "KKLLKK", &losses, &indices, &N, &D, &mean, &divisor)) {
    return nullptr;
  }
  return guarded([&]() -> PyObject* {
    check_sizes(N >= 0 && D >= 1);
    {
      const WithoutPythonLock unlocked;
      fastvq::counted_mean(address<const float*>(losses), address<const int64_t*>(indices), N, D,
                           address<float*>(mean), address<float*>(divisor));
    }
    Py_RETURN_NONE;
  });
}

PyObject* residual_quantize(PyObject*, PyObject* args) {
  CodedRowsArguments in;
  unsigned long long quantized, indices;
  int num_threads;
  if (!PyArg_ParseTuple(args, CODED_ROWS_FORMAT "KKi", &in.x, &in.x_dtype, &in.codebook,
                        &in.codebook_dtype, &in.books, &in.rows_per_book, &in.K, &in.D, &quantized,
                        &indices, &num_threads)) {
    return nullptr;
  }
  return guarded([&]() -> PyObject* {
    in.checked(num_threads);
    const fastvq::NearestCodeKernel kernel = kernel_in_use();
    const fastvq::RowPasses& passes = passes_in_use();
    {
      const WithoutPythonLock unlocked;
      fastvq::residual_quantize(kernel, passes, address<const void*>(in.x), in.x_dtype,
                                address<const void*>(in.codebook), in.codebook_dtype,
                                address<void*>(quantized), address<int64_t*>(indices),
                                in.rows_per_book, in.books, in.K, in.D, num_threads);
    }
    Py_RETURN_NONE;
  });
}

}  // namespace

PyMethodDef code_methods[] = {
    {"nearest_code", nearest_code, METH_VARARGS,
     "nearest_code(x, x_dtype, codebook, codebook_dtype, indices, distance, N, K, D, metric, "
     "num_threads, searches=15)\n\n"
     "Writes the exact nearest code of each row into indices (int64), and the winner's score into\n"
     "distance (float32; 0 for none). Tensors are addresses of contiguous memory; dtype codes:\n"
     "0 float32, 1 float16, 2 bfloat16; metric: 0 l2, 1 dot. searches, for tests: which coarse "
     "searches may be used,\n"
     "1 int8 + 2 int16 + 4 float32. See kernels/cpu/nearest_code.h."},
    {"code_statistics", code_statistics, METH_VARARGS,
     "code_statistics(x, x_dtype, indices, counts, sums, books, N, K, D, num_threads)\n\n"
     "Writes the number of rows per code into counts (float32, (books, K)) and their sums into\n"
     "sums (float32, (books, K, D)); x is (books, N, D). See kernels/cpu/code_statistics.h."},
    {"ema_step", ema_step, METH_VARARGS,
     "ema_step(counts, sums, codes, books, K, D, decay, eps, unit, batch_counts, batch_sums,\n"
     "num_threads)\n\n"
     "codes may be 0. See kernels/cpu/ema_step.h."},
    {"ema_step_of_rows", ema_step_of_rows, METH_VARARGS,
     "ema_step_of_rows(counts, sums, codes, books, K, D, decay, eps, unit, x, x_dtype, indices,\n"
     "N, batch_counts, num_threads)\n\n"
     "See kernels/cpu/ema_step.h."},
    {"vector_quantize", vector_quantize, METH_VARARGS,
     "vector_quantize(x, x_dtype, codebook, codebook_dtype, books, rows_per_book, K, D, mask,\n"
     "mask_rows, metric, quantized, indices, distance, num_threads)\n\n"
     "mask may be 0. See kernels/cpu/vector_quantize.h."},
    {"vector_quantize_backward_x", vector_quantize_backward_x, METH_VARARGS,
     "vector_quantize_backward_x(x, x_dtype, codebook, codebook_dtype, books, rows_per_book, K, "
     "D,\n"
     "indices, grad_quantized, grad_distance, stride, rotation, grad_x, num_threads)\n\n"
     "Either gradient may be 0. See kernels/cpu/vector_quantize.h."},
    {"vector_quantize_backward_codebook", vector_quantize_backward_codebook, METH_VARARGS,
     "vector_quantize_backward_codebook(x, x_dtype, codebook, codebook_dtype, books,\n"
     "rows_per_book, K, D, indices, grad_distance, stride, grad_codebook, num_threads)\n\n"
     "grad_codebook is float32. See kernels/cpu/vector_quantize.h."},
    {"counted_mean", counted_mean, METH_VARARGS,
     "counted_mean(losses, indices, N, D, mean, divisor)\n\n"
     "See kernels/cpu/counted_mean.h."},
    {"residual_quantize", residual_quantize, METH_VARARGS,
     "residual_quantize(x, x_dtype, codebooks, codebook_dtype, Q, N, K, D, quantized, indices,\n"
     "num_threads)\n\n"
     "See kernels/cpu/residual_quantize.h."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace bindings
