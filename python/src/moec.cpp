//===- moec.cpp - the runtime's C interface in Python -----------*- C++ -*-===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// moec._moec: libraries, layers and thread pools over include/moec.h. A call
// costs a few microseconds: tensors are described to the runtime where they lie
// and nothing is copied.
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

#include "moec.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace nb = nanobind;
using namespace nb::literals;

namespace {

//===----------------------------------------------------------------------===//
// Errors
//===----------------------------------------------------------------------===//

/// Raises moec.Error (the subclass that belongs to the code).
[[noreturn]] void raise(int code, const std::string &message) {
  // A message may quote bytes of a file: they need not be UTF-8.
  nb::object text = nb::steal(PyUnicode_DecodeUTF8(
      message.data(), static_cast<Py_ssize_t>(message.size()), "backslashreplace"));
  nb::object error = nb::module_::import_("moec.errors").attr("make_error")(code, text);
  PyErr_SetObject(reinterpret_cast<PyObject *>(Py_TYPE(error.ptr())), error.ptr());
  throw nb::python_error();
}

[[noreturn]] void raise(int code, const std::string &where, const std::string &expected,
                        const std::string &got, const std::string &hint = "") {
  raise(code, std::string(moec_error_name(code)) + ": " + where + ": expected " + expected +
                  ", but got " + got + (hint.empty() ? "" : "; " + hint));
}

void check(int code, const moec_error &error) {
  if (code)
    raise(code, error.message);
}

std::string typeName(nb::handle object) { return Py_TYPE(object.ptr())->tp_name; }

//===----------------------------------------------------------------------===//
// Tensors
//===----------------------------------------------------------------------===//

constexpr int maxDims = 16;

std::string shapeText(const int64_t *shape, int ndim) {
  std::string text = "[";
  for (int i = 0; i < ndim; ++i)
    text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

/// The exchange table of an object's type, or null. Looked up on the type, as DLPack asks, and
/// remembered for the last type seen.
const DLPackExchangeAPI *exchangeOf(nb::handle object) {
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
    std::string text = nb::str(cause.value()).c_str();
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
nb::object allocate(const Tensor &like, const int64_t *shape, int ndim, Element element,
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
    nb::object dtype = element == Element::Same  ? nb::object(nb::getattr(like.source, "dtype"))
                       : element == Element::I32 ? nb::object(nb::str("int32"))
                                                 : nb::object(nb::str("float32"));
    result = nb::steal(PyObject_CallFunctionObjArgs(empty, sizes.ptr(), dtype.ptr(), nullptr));
    if (!result.is_valid())
      throw nb::python_error();
  }
  view.read(result, "result", /*writable=*/true);
  return result;
}

//===----------------------------------------------------------------------===//
// Executors
//===----------------------------------------------------------------------===//

/// The runtime's own pool of threads.
struct Pool {
  explicit Pool(int threads, int spinMicroseconds)
      : threads(threads), spinMicroseconds(spinMicroseconds) {
    moec_pool_options options;
    MOEC_INIT(options);
    options.threads = threads;
    options.spin_us = spinMicroseconds;
    moec_error error;
    check(moec_pool_create(&options, &executor, &error), error);
  }
  ~Pool() { moec_pool_destroy(executor); }
  Pool(const Pool &) = delete;

  int threads, spinMicroseconds;
  moec_executor *executor = nullptr;
};

/// Runs every task on the calling thread, last one first: an executor that makes no promise (gang
/// 0), for finding out whether anything relies on one.
struct Serial {
  explicit Serial(int lanes) {
    if (lanes < 1)
      raise(MOEC_E_ARGUMENT, "Serial: lanes", "at least 1", std::to_string(lanes));
    executor = {sizeof executor, nullptr, lanes, 0, run};
  }
  static void run(void *, int32_t n, void (*task)(void *, int32_t), void *arg) {
    while (n-- > 0)
      task(arg, n);
  }
  moec_executor executor;
};

//===----------------------------------------------------------------------===//
// Library
//===----------------------------------------------------------------------===//

class Library {
public:
  Library(const std::string &dir, const std::optional<std::string> &weights, int load, bool verify,
          int deviceType, int deviceId, const std::optional<std::string> &level,
          nb::object executorObject, int64_t maxTokens, nb::object arguments)
      : executorObject(std::move(executorObject)), arguments(std::move(arguments)),
        maxTokens(maxTokens) {
    moec_open_options options;
    MOEC_INIT(options);
    options.weights = weights ? weights->c_str() : nullptr;
    options.load = load;
    options.verify = verify;
    options.device = {static_cast<DLDeviceType>(deviceType), deviceId};
    options.cpu_level = level ? level->c_str() : nullptr;
    if (!this->executorObject.is_none()) {
      nb::object capsule = this->executorObject.attr("__moec_executor__");
      executor = static_cast<moec_executor *>(PyCapsule_GetPointer(capsule.ptr(), "moec_executor"));
      if (!executor)
        throw nb::python_error();
    }
    moec_error error;
    int code;
    {
      nb::gil_scoped_release release;
      code = moec_open(dir.c_str(), &options, &model, &error);
    }
    check(code, error);
  }
  ~Library() {
    for (moec_context *context : idle)
      moec_context_destroy(context);
    moec_close(model);
  }
  Library(const Library &) = delete;

  int32_t count() const { return moec_layer_count(model); }

  /// One call in a context nobody else is using. Contexts are kept and are as many as there ever
  /// were calls at the same time. The list is touched with the GIL held only, so a fork between
  /// two Python instructions finds it whole.
  void run(int32_t layer, const moec_call &call) {
    moec_context *context = nullptr;
    moec_error error;
    int code = 0;
    {
      nb::ft_lock_guard guard(mutex);
      if (!idle.empty()) {
        context = idle.back();
        idle.pop_back();
      }
    }
    if (!context) {
      moec_context_options options;
      MOEC_INIT(options);
      options.max_tokens = maxTokens;
      options.executor = executor;
      check(moec_context_create(model, &options, &context, &error), error);
    }
    {
      nb::gil_scoped_release release;
      code = moec_run(context, layer, &call, &error);
    }
    {
      nb::ft_lock_guard guard(mutex);
      idle.push_back(context);
    }
    check(code, error);
  }

  moec_model *model = nullptr;
  nb::object executorObject, arguments;
  bool changed = false; // by set_weight: what is on disk is no longer what is here

private:
  moec_executor *executor = nullptr;
  int64_t maxTokens;
  nb::ft_mutex mutex;
  std::vector<moec_context *> idle;
};

struct LayerInfo {
  std::string name, kind, compute, format, layout, level;
  int32_t index;
  int64_t H, F, E, K, S, W;
  uint32_t needs;
  uint64_t weightBytes, activeFlops;
};

std::string dtypeName(DLDataType type) {
  const char *kind = type.code == kDLBfloat ? "bf" : type.code == kDLFloat ? "f" : "?";
  return kind + std::to_string(type.bits);
}

class Layer {
public:
  Layer(std::shared_ptr<Library> library, int32_t number)
      : library(std::move(library)), number(number) {
    MOEC_INIT(info);
    moec_error error;
    check(moec_get_layer_info(this->library->model, number, &info, &error), error);
  }

  LayerInfo describe() const {
    return {info.name,
            info.kind ? "dense" : "moe",
            dtypeName(info.compute),
            info.format,
            info.layout,
            info.level,
            info.index,
            info.H,
            info.F,
            info.E,
            info.K,
            info.S,
            info.W,
            info.needs,
            info.weight_bytes,
            info.active_flops};
  }

  /// x, and the further inputs a layer may need.
  struct Inputs {
    nb::object routerX, tokenIds, tokenTypes, sequences, state;
  };

  nb::object call(nb::handle xObject, nb::object out, bool accumulate, const Inputs &inputs) {
    Tensor x, y;
    x.read(xObject, "x");
    x.flatten("x");
    moec_call call;
    MOEC_INIT(call);
    Tensor extra[5];
    attach(call, inputs, extra);
    return finish(call, x, y, std::move(out), accumulate);
  }

  nb::object experts(nb::handle xObject, nb::handle idObject, nb::handle weightObject,
                     nb::object out, bool accumulate, bool skipForeign) {
    Tensor x, ids, weights, y;
    x.read(xObject, "x");
    x.flatten("x");
    ids.read(idObject, "idx");
    ids.flatten("idx");
    weights.read(weightObject, "w");
    weights.flatten("w");
    moec_call call;
    MOEC_INIT(call);
    call.flags = MOEC_ROUTED_ONLY | (skipForeign ? MOEC_SKIP_FOREIGN : 0);
    call.experts = ids.get();
    call.weights = weights.get();
    return finish(call, x, y, std::move(out), accumulate);
  }

  nb::object route(nb::handle xObject, bool logits, const Inputs &inputs) {
    if (info.kind)
      raise(MOEC_E_ARGUMENT, std::string(info.name) + ": route", "a MoE layer", "a dense one");
    Tensor x, ids, weights, scores;
    x.read(xObject, "x");
    x.flatten("x");
    moec_call call;
    MOEC_INIT(call);
    Tensor extra[5];
    attach(call, inputs, extra);
    call.x = x.get();
    int64_t chosen[2] = {x.rows(), info.K}, all[2] = {x.rows(), info.E};
    nb::object idObject = allocate(x, chosen, 2, Element::I32, ids);
    nb::object weightObject = allocate(x, chosen, 2, Element::F32, weights);
    call.experts_out = ids.get();
    call.weights_out = weights.get();
    if (!logits) {
      library->run(number, call);
      return nb::make_tuple(idObject, weightObject);
    }
    nb::object logitObject = allocate(x, all, 2, Element::F32, scores);
    call.logits_out = scores.get();
    library->run(number, call);
    return nb::make_tuple(idObject, weightObject, logitObject);
  }

  void setWeight(const std::string &role, nb::handle object, int64_t expert) {
    Tensor source;
    source.read(object, role.c_str());
    moec_error error;
    int code;
    {
      nb::gil_scoped_release release;
      code = moec_set_weight(library->model, number, role.c_str(), expert, source.get(), 0, &error);
    }
    check(code, error);
    library->changed = true;
  }

  std::shared_ptr<Library> library;
  int32_t number;
  moec_layer_info info;

private:
  /// Further inputs in the order of `Inputs`; what the layer does not need the runtime refuses.
  static void attach(moec_call &call, const Inputs &inputs, Tensor (&extra)[5]) {
    if (inputs.routerX.is_valid() && !inputs.routerX.is_none()) {
      extra[0].read(inputs.routerX, "router_x");
      extra[0].flatten("router_x");
      call.router_x = extra[0].get();
    }
    auto plain = [&](const nb::object &object, int slot, const char *where) -> const DLTensor * {
      if (!object.is_valid() || object.is_none())
        return nullptr;
      extra[slot].read(object, where);
      return extra[slot].get();
    };
    call.token_ids = plain(inputs.tokenIds, 1, "token_ids");
    call.token_types = plain(inputs.tokenTypes, 2, "token_types");
    call.sequences = plain(inputs.sequences, 3, "sequences");
    call.state = plain(inputs.state, 4, "state");
  }

  nb::object finish(moec_call &call, Tensor &x, Tensor &y, nb::object out, bool accumulate) {
    if (out.is_none()) {
      if (accumulate)
        raise(MOEC_E_ARGUMENT, "accumulate", "out=, the tensor to add to", "none");
      // The layer's own width, so that an x of another width is the runtime's to refuse.
      int64_t shape[maxDims];
      std::copy_n(x.lead, x.leadDims, shape);
      shape[x.leadDims] = info.H;
      out = allocate(x, shape, x.leadDims + 1, Element::Same, y);
      y.flatten("result");
    } else {
      y.read(out, "out", /*writable=*/true);
      y.flatten("out");
      if (y.leadDims != x.leadDims || !std::equal(x.lead, x.lead + x.leadDims, y.lead))
        raise(MOEC_E_SHAPE, "out", "the leading dimensions of x, " + shapeText(x.lead, x.leadDims),
              shapeText(y.lead, y.leadDims));
    }
    if (accumulate)
      call.flags |= MOEC_ACCUMULATE;
    call.x = x.get();
    call.y = y.get();
    library->run(number, call);
    return out;
  }
};

/// `library.layers`: a sequence that makes its items when asked, so that library and layers do not
/// keep each other alive.
struct Layers {
  std::shared_ptr<Library> library;

  Layer at(int64_t i) const {
    int64_t count = library->count();
    int64_t wrapped = i < 0 ? i + count : i;
    if (wrapped < 0 || wrapped >= count)
      throw nb::index_error(
          ("expected a layer below " + std::to_string(count) + ", but got " + std::to_string(i))
              .c_str());
    return Layer(library, static_cast<int32_t>(wrapped));
  }
};

} // namespace

NB_MODULE(_moec, m) {
  nb::set_leak_warnings(false); // a library kept in a global variable is no leak
  m.doc() = "The moec runtime (moec.h). Use it through the package `moec`.";
  m.attr("ABI") = MOEC_ABI;
  m.def("abi_version", &moec_abi_version, "MOEC_ABI of the runtime library that was loaded.");
  m.def("error_name", &moec_error_name, "code"_a, "\"E-SHAPE\" for 101.");

  nb::dict codes;
#define MOEC_ERROR(number, name, text, sentence) codes[text] = number;
#include "moec/errors.def"
#undef MOEC_ERROR
  m.attr("codes") = codes;

  nb::class_<Pool>(m, "Pool",
                   "A pool of threads that several libraries may share: moec.load(..., "
                   "threads=moec.Pool(8)). It survives fork: the child starts threads of its own.")
      .def(nb::init<int, int>(), "threads"_a = 0, "spin_us"_a = 0,
           "threads: tasks at once, the caller included; 0: as many as this process may use. "
           "spin_us: how long a worker polls before it sleeps; 0: the default.")
      .def_prop_ro("lanes", [](const Pool &p) { return p.executor->lanes; })
      .def_prop_ro("__moec_executor__",
                   [](const Pool &p) { return nb::capsule(p.executor, "moec_executor"); })
      .def("__reduce__", [](nb::handle self) {
        const Pool &p = nb::cast<const Pool &>(self);
        return nb::make_tuple(self.type(), nb::make_tuple(p.threads, p.spinMicroseconds));
      });

  nb::class_<Serial>(m, "Serial",
                     "An executor that runs every task on the calling thread, the last one first.")
      .def(nb::init<int>(), "lanes"_a)
      .def_prop_ro("lanes", [](const Serial &s) { return s.executor.lanes; })
      .def_prop_ro("__moec_executor__",
                   [](const Serial &s) { return nb::capsule(&s.executor, "moec_executor"); })
      .def("__reduce__", [](nb::handle self) {
        return nb::make_tuple(self.type(),
                              nb::make_tuple(nb::cast<const Serial &>(self).executor.lanes));
      });

  nb::class_<LayerInfo>(m, "LayerInfo", "What a layer is.")
      .def_ro("name", &LayerInfo::name, "\"model.layers.3.mlp\"")
      .def_ro("index", &LayerInfo::index, "Number of the decoder layer it belongs to.")
      .def_ro("kind", &LayerInfo::kind, "\"moe\" or \"dense\".")
      .def_ro("H", &LayerInfo::H, "Hidden width.")
      .def_ro("F", &LayerInfo::F, "Width of one expert, or of the dense layer.")
      .def_ro("E", &LayerInfo::E, "Number of experts; 1 if dense.")
      .def_ro("K", &LayerInfo::K, "Experts chosen per token; 1 if dense.")
      .def_ro("S", &LayerInfo::S, "Width of the shared expert; 0: none.")
      .def_ro("W", &LayerInfo::W, "Width of the carried router state; 0: none.")
      .def_ro("compute", &LayerInfo::compute, "What x is rounded to when read: \"f32\", \"bf16\".")
      .def_ro("format", &LayerInfo::format, "Format of the experts' weights.")
      .def_ro("layout", &LayerInfo::layout, "Layout of the experts' weights.")
      .def_ro("level", &LayerInfo::level, "CPU level of the code that runs: \"x86-64-v4\".")
      .def_ro("weight_bytes", &LayerInfo::weightBytes, "Bytes of packed weights.")
      .def_ro("active_flops", &LayerInfo::activeFlops, "Floating-point operations per token.")
      .def_prop_ro(
          "needs",
          [](const LayerInfo &info) {
            static const char *const names[] = {"token_ids", "token_types", "sequences", "router_x",
                                                "state"};
            nb::list list;
            for (int i = 0; i < 5; ++i)
              if (info.needs >> i & 1)
                list.append(names[i]);
            return nb::tuple(list);
          },
          "Names of the inputs a call needs besides x.")
      .def("__repr__", [](const LayerInfo &i) {
        std::string text = "LayerInfo(" + i.name + ": " + i.kind + " H=" + std::to_string(i.H) +
                           " F=" + std::to_string(i.F);
        if (i.kind == "moe")
          text += " E=" + std::to_string(i.E) + " K=" + std::to_string(i.K);
        return text + " " + i.format + " " + i.level + ")";
      });

  nb::class_<Layers>(m, "Layers", "The layers of a library, in model order.")
      .def("__len__", [](const Layers &l) { return l.library->count(); })
      .def("__getitem__", [](const Layers &l, int64_t i) { return l.at(i); })
      .def("__getitem__", [](const Layers &l, nb::slice slice) {
        auto [start, stop, step, length] = slice.compute(static_cast<size_t>(l.library->count()));
        nb::list list;
        for (size_t i = 0; i < length; ++i, start += step)
          list.append(l.at(start));
        return list;
      });

  nb::class_<Layer>(m, "Layer",
                    "One layer of a library. Tensors are NumPy arrays or torch tensors on the "
                    "CPU, [..., H], f32 or bf16; what comes back is of the same kind. Nothing is "
                    "copied and the GIL is released while the layer runs; several threads may "
                    "call the same layer.")
      .def_prop_ro("name", [](const Layer &l) { return l.info.name; })
      .def_prop_ro("index", [](const Layer &l) { return l.info.index; })
      .def_prop_ro("kind", [](const Layer &l) { return l.info.kind ? "dense" : "moe"; })
      .def_prop_ro("info", &Layer::describe)
      .def_prop_ro("library", [](const Layer &l) { return l.library; })
      .def(
          "__call__",
          [](Layer &l, nb::handle x, nb::object out, bool accumulate, nb::object tokenIds,
             nb::object tokenTypes, nb::object sequences, nb::object routerX, nb::object state) {
            return l.call(x, std::move(out), accumulate,
                          {std::move(routerX), std::move(tokenIds), std::move(tokenTypes),
                           std::move(sequences), std::move(state)});
          },
          "x"_a.none(), nb::kw_only(), "out"_a = nb::none(), "accumulate"_a = false,
          "token_ids"_a = nb::none(), "token_types"_a = nb::none(), "sequences"_a = nb::none(),
          "router_x"_a = nb::none(), "state"_a = nb::none(),
          "y [..., H] = the layer of x [..., H].\n\n"
          "out: written instead of a new tensor; f32 or bf16, may not overlap x.\n"
          "accumulate: out += the layer of x.\n"
          "The other arguments are inputs that some layers need: see info.needs.")
      .def(
          "route",
          [](Layer &l, nb::handle x, bool logits, nb::object tokenIds, nb::object tokenTypes,
             nb::object sequences, nb::object routerX, nb::object state) {
            return l.route(x, logits,
                           {std::move(routerX), std::move(tokenIds), std::move(tokenTypes),
                            std::move(sequences), std::move(state)});
          },
          "x"_a.none(), "logits"_a = false, nb::kw_only(), "token_ids"_a = nb::none(),
          "token_types"_a = nb::none(), "sequences"_a = nb::none(), "router_x"_a = nb::none(),
          "state"_a = nb::none(),
          "(ids int32 [T,K], weights float32 [T,K][, logits float32 [T,E]]), best first, ties by "
          "rising id. T counts the tokens of all leading dimensions.")
      .def("experts", &Layer::experts, "x"_a.none(), "idx"_a.none(), "w"_a.none(), nb::kw_only(),
           "out"_a = nb::none(), "accumulate"_a = false, "skip_foreign"_a = false,
           "y [..., H] = the sum over k of w[t,k] * expert idx[t,k] of x, any k; the router is not "
           "asked.\n\nidx int32 or int64 [..., k]; -1 is no expert; skip_foreign: other ids "
           "outside 0 ... E-1 are no expert either (else E-EXPERT-ID).\nw f32 or bf16 [..., k].")
      .def("set_weight", &Layer::setWeight, "role"_a, "tensor"_a.none(), "expert"_a = -1,
           "Packs a weight from memory: role \"gate\", \"up\", \"gate_up\", \"down\" or "
           "\"router\", of one expert or of all (-1). The layer must not be running.")
      .def("__repr__",
           [](const Layer &l) {
             return "<moec.Layer " + std::string(l.info.name) + (l.info.kind ? " dense>" : " moe>");
           })
      .def("__eq__",
           [](const Layer &a, nb::handle other) {
             return nb::isinstance<Layer>(other) &&
                    nb::cast<const Layer &>(other).library == a.library &&
                    nb::cast<const Layer &>(other).number == a.number;
           })
      .def("__hash__",
           [](const Layer &l) {
             return reinterpret_cast<intptr_t>(l.library.get()) / 16 + l.number;
           })
      .def("__reduce__", [](const Layer &l) {
        return nb::make_tuple(nb::module_::import_("moec.library").attr("_layer"),
                              nb::make_tuple(l.library, l.number));
      });

  nb::class_<Library>(m, "Library", "A compiled model. Made by moec.load and moec.compile.")
      .def(nb::init<const std::string &, const std::optional<std::string> &, int, bool, int, int,
                    const std::optional<std::string> &, nb::object, int64_t, nb::object>(),
           "dir"_a, "weights"_a.none(), "load"_a, "verify"_a, "device_type"_a, "device_id"_a,
           "cpu_level"_a.none(), "executor"_a.none(), "max_tokens"_a, "arguments"_a)
      .def_prop_ro(
          "layers", [](std::shared_ptr<Library> library) { return Layers{library}; },
          "The layers in model order.")
      .def_prop_ro("path", [](const Library &l) { return l.arguments["dir"]; })
      .def("__len__", &Library::count)
      .def("__repr__",
           [](const Library &l) {
             return "<moec.Library " + std::string(nb::str(l.arguments["dir"]).c_str()) + ", " +
                    std::to_string(l.count()) + " layers>";
           })
      .def("__reduce__", [](const Library &l) {
        if (l.changed)
          raise(MOEC_E_ARGUMENT, "pickle", "a library as it lies on disk",
                "one whose weights were set from memory",
                "they would be lost: pickle a fresh moec.load and set them again there");
        return nb::make_tuple(nb::module_::import_("moec.library").attr("_load"),
                              nb::make_tuple(l.arguments));
      });
}
