//===- Tensor.h - Python tensors as DLTensors -------------------*- C++ -*-===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// Tensors come in through the first door that is open:
//   1. type(x).__dlpack_c_exchange_api__ (torch): a C function fills a DLTensor;
//      results are allocated by the same table, so torch is never imported here;
//   2. the buffer protocol (NumPy). Element type H (uint16) is read as the bits
//      of bfloat16; an ml_dtypes bfloat16 array, which has no buffer, goes
//      through x.view("uint16");
//   3. __dlpack__ (anything else on the CPU), for inputs and out=.
//
//===----------------------------------------------------------------------===//

#ifndef MOEC_PYTHON_TENSOR_H
#define MOEC_PYTHON_TENSOR_H

#include "moec.h"

#include <nanobind/nanobind.h>

#include <algorithm>
#include <string>

namespace nb = nanobind;
using namespace nb::literals;

namespace moec::python {

//===----------------------------------------------------------------------===//
// Errors
//===----------------------------------------------------------------------===//

/// Raises moec.Error (the subclass that belongs to the code).
[[noreturn]] inline void raise(int code, const std::string &message) {
  // A message may quote bytes of a file: they need not be UTF-8.
  nb::object text = nb::steal(PyUnicode_DecodeUTF8(
      message.data(), static_cast<Py_ssize_t>(message.size()), "backslashreplace"));
  nb::object error = nb::module_::import_("moec.errors").attr("make_error")(code, text);
  PyErr_SetObject(reinterpret_cast<PyObject *>(Py_TYPE(error.ptr())), error.ptr());
  throw nb::python_error();
}

[[noreturn]] inline void raise(int code, const std::string &where, const std::string &expected,
                               const std::string &got, const std::string &hint = "") {
  raise(code, std::string(moec_error_name(code)) + ": " + where + ": expected " + expected +
                  ", but got " + got + (hint.empty() ? "" : "; " + hint));
}

inline void check(int code, const moec_error &error) {
  if (code)
    raise(code, error.message);
}

inline std::string typeName(nb::handle object) { return Py_TYPE(object.ptr())->tp_name; }

//===----------------------------------------------------------------------===//
// Tensors
//===----------------------------------------------------------------------===//

constexpr int maxDims = 16;

inline std::string shapeText(const int64_t *shape, int ndim) {
  std::string text = "[";
  for (int i = 0; i < ndim; ++i)
    text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

/// The exchange table of an object's type, or null. Looked up on the type, as DLPack asks, and
/// remembered for the last type seen.
inline const DLPackExchangeAPI *exchangeOf(nb::handle object) {
  static PyTypeObject *lastType = nullptr;
  static const DLPackExchangeAPI *lastApi = nullptr;
  PyTypeObject *type = Py_TYPE(object.ptr());
  if (type == lastType)
    return lastApi;
  static PyObject *name = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
  const DLPackExchangeAPI *api = nullptr;
  if (PyObject *capsule = PyObject_GetAttr(reinterpret_cast<PyObject *>(type), name)) {
    api = static_cast<const DLPackExchangeAPI *>(
        PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    Py_DECREF(capsule);
  }
  PyErr_Clear();
  while (api && api->header.version.major != DLPACK_MAJOR_VERSION)
    api = reinterpret_cast<const DLPackExchangeAPI *>(api->header.prev_api);
  if (api && !api->dltensor_from_py_object_no_sync)
    api = nullptr;
  // A strong reference, so that the address cannot be taken by another type.
  Py_INCREF(type);
  Py_XDECREF(lastType);
  lastType = type;
  lastApi = api;
  return api;
}

/// A Python tensor as a DLTensor [T, width] over the same memory, and what keeps it there.
class Tensor {
public:
  Tensor() = default;
  Tensor(const Tensor &) = delete;
  Tensor &operator=(const Tensor &) = delete;
  ~Tensor() {
    if (hasBuffer)
      PyBuffer_Release(&buffer);
    if (managed && managed->deleter)
      managed->deleter(managed);
  }

  /// Describes `object`. `where` is for errors; `writable`: it is an output.
  void read(nb::handle object, const char *where, bool writable = false) {
    source = object;
    if (const DLPackExchangeAPI *table = exchangeOf(object)) {
      api = table;
      if (api->dltensor_from_py_object_no_sync(object.ptr(), &view))
        refuse(where);
      adopt(where);
      return;
    }
    if (readBuffer(object, where, writable))
      return;
    if (nb::hasattr(object, "__dlpack__")) {
      readCapsule(object, where, writable);
      return;
    }
    raise(MOEC_E_ARGUMENT, where, "a NumPy array or a torch tensor", typeName(object));
  }

  /// Collapses the leading dimensions: [..., width] to [T, width]. One dimension is one token.
  void flatten(const char *where) {
    if (view.ndim < 1)
      raise(MOEC_E_SHAPE, where, "at least one dimension", "none");
    int last = view.ndim - 1;
    leadDims = last;
    std::copy_n(shape, last, lead);
    int64_t count = 1, rowStride = std::max<int64_t>(shape[last], 1);
    for (int i = 0; i < last; ++i)
      count *= shape[i];
    if (count > 1) {
      int64_t expected = -1; // stride the next outer dimension must have
      for (int i = last - 1; i >= 0; --i) {
        if (shape[i] == 1)
          continue;
        if (expected < 0)
          rowStride = strides[i];
        else if (strides[i] != expected)
          raise(MOEC_E_STRIDE, where, "leading dimensions that lie evenly in memory",
                "strides " + shapeText(strides, view.ndim) + " for shape " +
                    shapeText(shape, view.ndim),
                "make it contiguous");
        expected = strides[i] * shape[i];
      }
    }
    int64_t width = shape[last], inner = strides[last];
    // The inner stride of a dimension of one element says nothing; frameworks leave anything there.
    if (width <= 1)
      inner = 1;
    shape[0] = count;
    shape[1] = width;
    strides[0] = rowStride;
    strides[1] = inner;
    view.ndim = 2;
  }

  int64_t rows() const { return shape[0]; }
  DLTensor *get() { return &view; }

  bool fromTorch() const { return api != nullptr; }

  /// The stream on which the tensor's framework is working on its device; null on the CPU.
  void *stream() const {
    void *current = nullptr;
    if (view.device.device_type == kDLCPU || !api || !api->current_work_stream)
      return nullptr;
    if (api->current_work_stream(view.device.device_type, view.device.device_id, &current))
      throw nb::python_error();
    return current;
  }
  const DLPackExchangeAPI *table() const { return api; }

  DLTensor view{};
  int64_t shape[maxDims], strides[maxDims];
  int64_t lead[maxDims];
  int leadDims = 0;
  nb::handle source;

private:
  /// A refusal by the framework (sparse, quantized, on the meta device …) in our words.
  [[noreturn]] void refuse(const char *where) {
    nb::python_error cause;
    // What follows the first line is the framework's own stack.
    std::string text = nb::str(cause.value()).c_str();
    text.erase(std::min(text.find('\n'), text.size()));
    raise(MOEC_E_ARGUMENT, where, "a dense tensor in memory", "one that DLPack refuses: " + text);
  }

  /// Copies shape and strides, which may live in the framework's own memory, and makes strides
  /// explicit.
  void adopt(const char *where) {
    if (view.ndim > maxDims)
      raise(MOEC_E_SHAPE, where, "at most 16 dimensions", std::to_string(view.ndim));
    std::copy_n(view.shape, view.ndim, shape);
    if (view.strides) {
      std::copy_n(view.strides, view.ndim, strides);
    } else {
      int64_t step = 1;
      for (int i = view.ndim - 1; i >= 0; --i) {
        strides[i] = step;
        step *= shape[i];
      }
    }
    view.shape = shape;
    view.strides = strides;
  }

  bool readBuffer(nb::handle object, const char *where, bool writable) {
    nb::object held;
    PyObject *from = object.ptr();
    if (!PyObject_CheckBuffer(from))
      return false;
    int flags = PyBUF_STRIDES | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0);
    if (PyObject_GetBuffer(from, &buffer, flags)) {
      nb::python_error cause;
      // ml_dtypes: a type the buffer protocol has no letter for.
      nb::object dtype = nb::getattr(object, "dtype", nb::none());
      std::string name = nb::str(nb::getattr(dtype, "name", nb::str(""))).c_str();
      if (name == "bfloat16") {
        held = object.attr("view")("uint16");
        if (PyObject_GetBuffer(held.ptr(), &buffer, flags)) {
          nb::python_error again;
          raise(MOEC_E_ARGUMENT, where, writable ? "a writable array" : "an array in memory",
                nb::str(again.value()).c_str());
        }
      } else if (dtype.is_none() || name == "object" || !writable) {
        raise(MOEC_E_DTYPE, where, "f32 or bf16", name.empty() ? typeName(object) : name);
      } else {
        raise(MOEC_E_ARGUMENT, where, "a writable array", nb::str(cause.value()).c_str());
      }
    }
    hasBuffer = true;
    if (buffer.ndim > maxDims)
      raise(MOEC_E_SHAPE, where, "at most 16 dimensions", std::to_string(buffer.ndim));
    view.data = buffer.buf;
    view.device = {kDLCPU, 0};
    view.ndim = buffer.ndim;
    view.dtype = dtypeOf(buffer.format, static_cast<int>(buffer.itemsize), where);
    view.byte_offset = 0;
    for (int i = 0; i < buffer.ndim; ++i) {
      shape[i] = buffer.shape[i];
      if (buffer.strides[i] % buffer.itemsize)
        raise(MOEC_E_STRIDE, where, "strides that are multiples of the element",
              std::to_string(buffer.strides[i]) + " bytes");
      strides[i] = buffer.strides[i] / buffer.itemsize;
    }
    view.shape = shape;
    view.strides = strides;
    return true;
  }

  static DLDataType dtypeOf(const char *format, int bytes, const char *where) {
    std::string letter = format ? format : "B";
    if (letter.size() == 2 && (letter[0] == '@' || letter[0] == '=' || letter[0] == '<'))
      letter.erase(0, 1);
    uint8_t bits = static_cast<uint8_t>(8 * bytes);
    if (letter == "f" || letter == "d" || letter == "e")
      return {kDLFloat, bits, 1};
    if (letter == "H")
      return {kDLBfloat, 16, 1};
    if (letter == "b" || letter == "h" || letter == "i" || letter == "l" || letter == "q")
      return {kDLInt, bits, 1};
    if (letter == "B" || letter == "I" || letter == "L" || letter == "Q")
      return {kDLUInt, bits, 1};
    if (letter == "?")
      return {kDLBool, bits, 1};
    raise(MOEC_E_DTYPE, where, "a plain number type in this machine's byte order",
          "format \"" + letter + "\"");
  }

  void readCapsule(nb::handle object, const char *where, bool writable) {
    nb::object capsule;
    try {
      capsule = object.attr("__dlpack__")("max_version"_a = nb::make_tuple(1, 3));
    } catch (nb::python_error &cause) {
      raise(MOEC_E_ARGUMENT, where, "a tensor that DLPack can describe", cause.what());
    }
    managed = static_cast<DLManagedTensorVersioned *>(
        PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
    if (!managed) {
      PyErr_Clear();
      raise(MOEC_E_ARGUMENT, where, "DLPack 1.x", "an older version from " + typeName(object));
    }
    PyCapsule_SetName(capsule.ptr(), "used_dltensor_versioned");
    if (writable && (managed->flags & DLPACK_FLAG_BITMASK_READ_ONLY))
      raise(MOEC_E_ARGUMENT, where, "a writable tensor", "a read-only one");
    view = managed->dl_tensor;
    adopt(where);
  }

  const DLPackExchangeAPI *api = nullptr;
  Py_buffer buffer{};
  bool hasBuffer = false;
  DLManagedTensorVersioned *managed = nullptr;
};

/// Element type of a result.
enum class Element { Same, I32, F32 };

/// A new tensor of the kind of `like` with its own memory (not initialised), described in `view`.
inline nb::object allocate(const Tensor &like, const int64_t *shape, int ndim, Element element,
                           Tensor &view) {
  nb::object result;
  if (like.fromTorch()) {
    DLTensor prototype{};
    int64_t sizes[maxDims];
    std::copy_n(shape, ndim, sizes);
    prototype.shape = sizes;
    prototype.ndim = ndim;
    prototype.device = like.view.device;
    prototype.dtype = element == Element::Same  ? like.view.dtype
                      : element == Element::I32 ? DLDataType{kDLInt, 32, 1}
                                                : DLDataType{kDLFloat, 32, 1};
    DLManagedTensorVersioned *managed = nullptr;
    std::string text;
    auto setError = [](void *context, const char *, const char *message) {
      *static_cast<std::string *>(context) = message;
    };
    if (like.table()->managed_tensor_allocator(&prototype, &managed, &text, setError)) {
      PyErr_Clear();
      raise(MOEC_E_MEMORY, "result", shapeText(shape, ndim), text.empty() ? "no memory" : text);
    }
    void *object = nullptr;
    if (like.table()->managed_tensor_to_py_object_no_sync(managed, &object))
      throw nb::python_error();
    result = nb::steal(static_cast<PyObject *>(object));
  } else {
    static PyObject *empty = [] {
      return nb::object(nb::module_::import_("numpy").attr("empty")).release().ptr();
    }();
    nb::object sizes = nb::steal(PyTuple_New(ndim));
    for (int i = 0; i < ndim; ++i)
      PyTuple_SET_ITEM(sizes.ptr(), i, PyLong_FromLongLong(shape[i]));
    // What has a buffer but is no array (memoryview) has a format instead of a dtype.
    const char *plain = like.view.dtype.code == kDLBfloat ? "uint16" : "float32";
    nb::object dtype = element == Element::Same  ? nb::getattr(like.source, "dtype", nb::str(plain))
                       : element == Element::I32 ? nb::object(nb::str("int32"))
                                                 : nb::object(nb::str("float32"));
    result = nb::steal(PyObject_CallFunctionObjArgs(empty, sizes.ptr(), dtype.ptr(), nullptr));
    if (!result.is_valid())
      throw nb::python_error();
  }
  view.read(result, "result", /*writable=*/true);
  return result;
}

} // namespace moec::python

#endif // MOEC_PYTHON_TENSOR_H
