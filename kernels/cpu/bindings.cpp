// The extension module _fastvq_C, and the only file that knows Python. Tensors arrive as addresses
// and sizes: the caller (fastvq/ops) has checked shapes, types and strides and keeps them alive.
#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <exception>
#include <new>
#include <stdexcept>

#include "code_statistics.h"
#include "counted_mean.h"
#include "ema_step.h"
#include "gated_activation.h"
#include "isa.h"
#include "masked_conv.h"
#include "nearest_code.h"
#include "residual_quantize.h"
#include "row_passes.h"
#include "rows.h"
#include "sample_row.h"
#include "vector_quantize.h"

namespace {

// Lets other Python threads run while it lives.
class WithoutPythonLock {
 public:
  WithoutPythonLock() : state_(PyEval_SaveThread()) {}
  ~WithoutPythonLock() { PyEval_RestoreThread(state_); }
  WithoutPythonLock(const WithoutPythonLock&) = delete;
  WithoutPythonLock& operator=(const WithoutPythonLock&) = delete;

 private:
  PyThreadState* state_;
};

// Calls body, turning C++ exceptions into Python's.
template <class Body>
PyObject* guarded(const Body& body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <class Pointer>
Pointer address(unsigned long long number) {
  return reinterpret_cast<Pointer>(static_cast<uintptr_t>(number));
}

void check(bool holds, const char* rule) {
  if (!holds) throw std::invalid_argument(rule);
}

void check_dtype(int dtype) {
  check(dtype >= fastvq::kFloat32 && dtype <= fastvq::kBFloat16,
        "_fastvq_C: dtype codes are 0 (float32), 1 (float16) and 2 (bfloat16).");
}

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

fastvq::SampleRowKernel sample_row_kernel_in_use() {
  switch (fastvq::isa_in_use()) {
#if defined(__x86_64__)
    case fastvq::Isa::kAmx:
    case fastvq::Isa::kAvx512:
      return fastvq::sample_row_avx512;
    case fastvq::Isa::kAvx2:
      return fastvq::sample_row_avx2;
#endif
    default:
      return fastvq::sample_row_generic;
  }
}

PyObject* sample_row(PyObject*, PyObject* args) {
  unsigned long long problem, columns;
  long long blocks;
  if (!PyArg_ParseTuple(args, "KKL", &problem, &columns, &blocks)) return nullptr;
  return guarded([&]() -> PyObject* {
    check(blocks >= 1, "_fastvq_C.sample_row: blocks must be at least 1.");
    const fastvq::SampleRowKernel kernel = sample_row_kernel_in_use();
    {
      const WithoutPythonLock unlocked;
      fastvq::sample_row(kernel, *address<const fastvq::SampleRowProblem*>(problem),
                         address<int64_t*>(columns), blocks);
    }
    Py_RETURN_NONE;
  });
}

fastvq::ConvKernels conv_kernels_in_use() {
  switch (fastvq::isa_in_use()) {
#if defined(__x86_64__)
    case fastvq::Isa::kAmx:
    case fastvq::Isa::kAvx512:
      return {&fastvq::masked_conv_avx512,
              fastvq::machine_has_bf16() ? fastvq::masked_conv_bf16 : nullptr,
              &fastvq::masked_conv_tiles_avx512};
    case fastvq::Isa::kAvx2:
      return {&fastvq::masked_conv_avx2, nullptr, &fastvq::masked_conv_tiles_avx2};
#endif
    default:
      return {&fastvq::masked_conv_generic, nullptr, &fastvq::masked_conv_tiles_generic};
  }
}

// Pictures, weight and taps as the calls below take them: dtype, B, C, O, H, W; x, y and their four
// strides each; weight, its strides of output and input channels; taps, their number.
#define CONV_FORMAT "iLLLLLKLLLLKLLLLKLLKL"
struct ConvArguments {
  unsigned long long x, y, weight, taps;
  int dtype;
  long long B, C, O, H, W, x_strides[4], y_strides[4], weight_strides[2], num_taps;

  template <class... More>
  bool parse(PyObject* args, const char* format, More*... more) {
    return PyArg_ParseTuple(args, format, &dtype, &B, &C, &O, &H, &W, &x, &x_strides[0],
                            &x_strides[1], &x_strides[2], &x_strides[3], &y, &y_strides[0],
                            &y_strides[1], &y_strides[2], &y_strides[3], &weight,
                            &weight_strides[0], &weight_strides[1], &taps, &num_taps, more...) != 0;
  }

  fastvq::ConvProblem checked(int num_threads) const {
    check_dtype(dtype);
    check(B >= 0 && C >= 0 && O >= 0 && H >= 0 && W >= 0 && num_taps >= 0 && num_threads >= 1,
          "_fastvq_C: sizes must be B, C, O, H, W, num_taps >= 0 and num_threads >= 1.");
    const fastvq::ConvTap* all = address<const fastvq::ConvTap*>(taps);
    for (long long i = 0; i < num_taps; ++i) {
      check(0 <= all[i].first && all[i].first <= all[i].last && all[i].last <= C,
            "_fastvq_C: a tap's channels must lie within x's.");
    }
    return {dtype,
            B,
            C,
            O,
            H,
            W,
            images(x, x_strides),
            images(y, y_strides),
            address<void*>(weight),
            weight_strides[0],
            weight_strides[1],
            all,
            num_taps};
  }
  static fastvq::ConvImages images(unsigned long long data, const long long (&strides)[4]) {
    return {address<void*>(data), strides[0], strides[1], strides[2], strides[3]};
  }
};

PyObject* masked_conv(PyObject*, PyObject* args) {
  ConvArguments in;
  unsigned long long bias;
  int add, winograd, num_threads;
  if (!in.parse(args, CONV_FORMAT "Kiii", &bias, &add, &winograd, &num_threads)) return nullptr;
  return guarded([&]() -> PyObject* {
    const fastvq::ConvProblem problem = in.checked(num_threads);
    const fastvq::ConvKernels kernels = conv_kernels_in_use();
    {
      const WithoutPythonLock unlocked;
      fastvq::masked_conv(kernels, problem, address<const void*>(bias), add != 0, winograd != 0,
                          num_threads);
    }
    Py_RETURN_NONE;
  });
}

PyObject* masked_conv_weight_gradient(PyObject*, PyObject* args) {
  ConvArguments in;
  unsigned long long grad_bias;
  int winograd, num_threads;
  if (!in.parse(args, CONV_FORMAT "Kii", &grad_bias, &winograd, &num_threads)) return nullptr;
  return guarded([&]() -> PyObject* {
    const fastvq::ConvProblem problem = in.checked(num_threads);
    const fastvq::ConvKernels kernels = conv_kernels_in_use();
    {
      const WithoutPythonLock unlocked;
      fastvq::masked_conv_weight_gradient(kernels, problem, address<void*>(grad_bias),
                                          winograd != 0, num_threads);
    }
    Py_RETURN_NONE;
  });
}

const fastvq::GatedActivationPasses& gated_activation_in_use() {
  switch (fastvq::isa_in_use()) {
#if defined(__x86_64__)
    case fastvq::Isa::kAmx:
    case fastvq::Isa::kAvx512:
      return fastvq::gated_activation_avx512;
    case fastvq::Isa::kAvx2:
      return fastvq::gated_activation_avx2;
#endif
    default:
      return fastvq::gated_activation_generic;
  }
}

// What both directions of the gate take first.
#define GATED_ACTIVATION_FORMAT "KKLKLiLLLKKd"
struct GatedActivationArguments {
  unsigned long long features, class_bias, mapped, stream, threshold;
  long long class_stride, mapped_stride, B, P, C;
  int dtype;
  double scale;

  fastvq::GatedActivation checked(int num_threads) const {
    check_dtype(dtype);
    check(B >= 0 && P >= 0 && C >= 1 && num_threads >= 1,
          "_fastvq_C: sizes must be B, P >= 0, C and num_threads >= 1.");
    return {address<const void*>(features),
            address<const void*>(class_bias),
            class_stride,
            address<const void*>(mapped),
            mapped_stride,
            dtype,
            B,
            P,
            C,
            stream,
            threshold,
            static_cast<float>(scale)};
  }
};

PyObject* gated_activation(PyObject*, PyObject* args) {
  GatedActivationArguments in;
  unsigned long long gated;
  int num_threads;
  if (!PyArg_ParseTuple(args, GATED_ACTIVATION_FORMAT "Ki", &in.features, &in.class_bias,
                        &in.class_stride, &in.mapped, &in.mapped_stride, &in.dtype, &in.B, &in.P,
                        &in.C, &in.stream, &in.threshold, &in.scale, &gated, &num_threads)) {
    return nullptr;
  }
  return guarded([&]() -> PyObject* {
    const fastvq::GatedActivation call = in.checked(num_threads);
    const fastvq::GatedActivationPasses& passes = gated_activation_in_use();
    {
      const WithoutPythonLock unlocked;
      fastvq::gated_activation(passes, call, address<void*>(gated), num_threads);
    }
    Py_RETURN_NONE;
  });
}

PyObject* gated_activation_backward(PyObject*, PyObject* args) {
  GatedActivationArguments in;
  unsigned long long grad, grad_features, sums, gated;
  int num_threads;
  if (!PyArg_ParseTuple(args, GATED_ACTIVATION_FORMAT "KKKKi", &in.features, &in.class_bias,
                        &in.class_stride, &in.mapped, &in.mapped_stride, &in.dtype, &in.B, &in.P,
                        &in.C, &in.stream, &in.threshold, &in.scale, &grad, &grad_features, &sums,
                        &gated, &num_threads)) {
    return nullptr;
  }
  return guarded([&]() -> PyObject* {
    const fastvq::GatedActivation call = in.checked(num_threads);
    const fastvq::GatedActivationPasses& passes = gated_activation_in_use();
    {
      const WithoutPythonLock unlocked;
      fastvq::gated_activation_backward(passes, call, address<const void*>(grad),
                                        address<void*>(grad_features), address<float*>(sums),
                                        address<void*>(gated), num_threads);
    }
    Py_RETURN_NONE;
  });
}

PyObject* isa_available(PyObject*, PyObject*) {
  return guarded([]() -> PyObject* {
    PyObject* names = PyList_New(0);
    if (names == nullptr) return nullptr;
    for (fastvq::Isa isa : fastvq::isa_available()) {
      PyObject* name = PyUnicode_FromString(fastvq::isa_name(isa));
      const bool added = name != nullptr && PyList_Append(names, name) == 0;
      Py_XDECREF(name);
      if (!added) {
        Py_DECREF(names);
        return nullptr;
      }
    }
    return names;
  });
}

PyObject* isa_in_use(PyObject*, PyObject*) {
  return guarded([] { return PyUnicode_FromString(fastvq::isa_name(fastvq::isa_in_use())); });
}

PyMethodDef methods[] = {
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
    {"sample_row", sample_row, METH_VARARGS,
     "sample_row(problem, columns, blocks)\n\n"
     "Draws one row of codes. problem: address of a SampleRowProblem; columns: address of\n"
     "(blocks,) int64, the next column of each range of samples. See kernels/cpu/sample_row.h."},
    {"masked_conv", masked_conv, METH_VARARGS,
     "masked_conv(dtype, B, C, O, H, W, x, *x_strides, y, *y_strides, weight, stride_o, stride_c,\n"
     "taps, num_taps, bias, add, winograd, num_threads)\n\n"
     "taps: address of (num_taps, 5) int64: dy, dx, weight offset, first and last channel. bias "
     "may\n"
     "be 0. See kernels/cpu/masked_conv.h."},
    {"masked_conv_weight_gradient", masked_conv_weight_gradient, METH_VARARGS,
     "masked_conv_weight_gradient(dtype, B, C, O, H, W, x, *x_strides, grad, *grad_strides,\n"
     "grad_weight, stride_o, stride_c, taps, num_taps, grad_bias, winograd, num_threads)\n\n"
     "grad_bias may be 0. See kernels/cpu/masked_conv.h."},
    {"gated_activation", gated_activation, METH_VARARGS,
     "gated_activation(features, class_bias, class_stride, mapped, mapped_stride, dtype, B,\n"
     "P, C, stream, threshold, scale, gated, num_threads)\n\n"
     "class_bias and mapped may be 0. See kernels/cpu/gated_activation.h."},
    {"gated_activation_backward", gated_activation_backward, METH_VARARGS,
     "gated_activation_backward(<as gated_activation, up to scale>, grad, grad_features, sums,\n"
     "gated, num_threads)\n\n"
     "See kernels/cpu/gated_activation.h."},
    {"isa_available", isa_available, METH_NOARGS,
     "Names of the instruction sets this machine has: generic, avx2, avx512, amx."},
    {"isa_in_use", isa_in_use, METH_NOARGS,
     "Name of the kernels the next call takes: the widest that the machine and the environment\n"
     "variable FASTVQ_CPU_ISA, read at every call, allow."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_fastvq_C",
                          "C++ kernels of fastvq; private, called by fastvq.ops.",
                          -1,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__fastvq_C() { return PyModule_Create(&definition); }
