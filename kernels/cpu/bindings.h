// What the files of the extension module share: Python's limited API, the lock, errors, and checks.
// Only bindings*.cpp include this; nothing else knows Python.
#pragma once

#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <exception>
#include <new>
#include <stdexcept>

#include "rows.h"

namespace bindings {

// The functions of bindings_codes.cpp, for the module.
extern PyMethodDef code_methods[];

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

inline void check(bool holds, const char* rule) {
  if (!holds) throw std::invalid_argument(rule);
}

inline void check_dtype(int dtype) {
  check(dtype >= fastvq::kFloat32 && dtype <= fastvq::kBFloat16,
        "_fastvq_C: dtype codes are 0 (float32), 1 (float16) and 2 (bfloat16).");
}

}  // namespace bindings
