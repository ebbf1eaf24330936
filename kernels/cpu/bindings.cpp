// The extension module _fastvq_C, and the only file that knows Python. Tensors arrive as addresses
// and sizes: the caller (fastvq/ops) has checked shapes, types and strides and keeps them alive.
#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <exception>
#include <new>
#include <stdexcept>

#include "code_statistics.h"
#include "isa.h"
#include "nearest_code.h"
#include "rows.h"

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
    check(N >= 0 && K >= 0 && D >= 1, "_fastvq_C.nearest_code: sizes must be N, K >= 0, D >= 1.");
    check(metric == fastvq::kL2 || metric == fastvq::kDot,
          "_fastvq_C.nearest_code: metric codes are 0 (l2) and 1 (dot).");
    check(num_threads >= 1, "_fastvq_C.nearest_code: num_threads must be at least 1.");
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
  long long N, K, D;
  int x_dtype, num_threads;
  if (!PyArg_ParseTuple(args, "KiKKKLLLi", &x, &x_dtype, &indices, &counts, &sums, &N, &K, &D,
                        &num_threads)) {
    return nullptr;
  }
  return guarded([&]() -> PyObject* {
    check_dtype(x_dtype);
    check(N >= 0 && K >= 0 && D >= 1,
          "_fastvq_C.code_statistics: sizes must be N, K >= 0, D >= 1.");
    check(num_threads >= 1, "_fastvq_C.code_statistics: num_threads must be at least 1.");
    {
      const WithoutPythonLock unlocked;
      fastvq::code_statistics(address<const void*>(x), x_dtype, address<const int64_t*>(indices),
                              address<float*>(counts), address<float*>(sums), N, K, D, num_threads);
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
     "code_statistics(x, x_dtype, indices, counts, sums, N, K, D, num_threads)\n\n"
     "Writes the number of rows per code into counts (float32, (K,)) and their sums into sums\n"
     "(float32, (K, D)). Index -1 is skipped. See kernels/cpu/code_statistics.h."},
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
