// The extension module _fastvq_C, and its calls around priors: masked convolutions, the gate,
// drawing codes; those around codes are bindings_codes.cpp. Tensors arrive as addresses and sizes:
// the caller (fastvq/ops) has checked shapes, types and strides and keeps them alive.
#include "bindings.h"

#include "gated_activation.h"
#include "isa.h"
#include "masked_conv.h"
#include "sample_row.h"

namespace bindings {
namespace {

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
}  // namespace bindings

PyMODINIT_FUNC PyInit__fastvq_C() {
  PyObject* module = PyModule_Create(&bindings::definition);
  if (module != nullptr && PyModule_AddFunctions(module, bindings::code_methods) != 0) {
    Py_CLEAR(module);
  }
  return module;
}
