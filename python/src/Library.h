//===- Library.h - a compiled model and its layers --------------*- C++ -*-===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOEC_PYTHON_LIBRARY_H
#define MOEC_PYTHON_LIBRARY_H

#include "Tensor.h"

#include <memory>
#include <optional>
#include <vector>

namespace moec::python {

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
    for (const Context &context : idle)
      moec_context_destroy(context.context);
    moec_close(model);
  }
  Library(const Library &) = delete;

  int32_t count() const { return moec_layer_count(model); }

  /// What a GPU has reported since the last check, as an error. The caller has synchronised.
  void checkDevice() {
    moec_error error;
    nb::ft_lock_guard guard(mutex);
    for (const Context &context : idle)
      check(moec_context_status(context.context, &error), error);
  }

  /// One call in a context nobody else is using. Contexts are kept and are as many as there ever
  /// were calls at the same time. The list is touched with the GIL held only, so a fork between
  /// two Python instructions finds it whole. On a GPU a context stays with its stream: kernels of
  /// an earlier call may still be using the workspace.
  void run(int32_t layer, const moec_call &call) {
    moec_context *context = nullptr;
    moec_error error;
    int code = 0;
    {
      nb::ft_lock_guard guard(mutex);
      for (size_t i = idle.size(); i-- > 0 && !context;)
        if (idle[i].stream == call.stream) {
          context = idle[i].context;
          idle[i] = idle.back();
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
      idle.push_back({context, call.stream});
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
  struct Context {
    moec_context *context;
    void *stream; // of the last call
  };
  std::vector<Context> idle;
};

struct LayerInfo {
  std::string name, kind, compute, format, layout, level;
  int32_t index;
  int64_t H, F, E, K, S, W;
  uint32_t needs;
  uint64_t weightBytes, activeFlops;
};

inline std::string dtypeName(DLDataType type) {
  const char *kind = type.code == kDLBfloat ? "bf" : type.code == kDLFloat ? "f" : "?";
  return kind + std::to_string(type.bits);
}

/// What moec.trace wants to hear of: called with (label, ids, weights, E) after every call of a MoE
/// layer that computed something; null: nobody listens. Touched with the GIL held.
inline PyObject *&recorder() {
  static PyObject *listener = nullptr;
  return listener;
}

class Layer {
public:
  Layer(std::shared_ptr<Library> library, int32_t number)
      : library(std::move(library)), number(number) {
    MOEC_INIT(info);
    moec_error error;
    check(moec_get_layer_info(this->library->model, number, &info, &error), error);
    label = info.name;
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

  nb::object call(nb::handle xObject, nb::object out, bool accumulate, bool routing,
                  const Inputs &inputs) {
    if (routing && info.kind)
      raise(MOEC_E_ARGUMENT, std::string(info.name) + ": routing", "a MoE layer", "a dense one");
    Tensor x, y;
    x.read(xObject, "x");
    x.flatten("x");
    moec_call call;
    MOEC_INIT(call);
    Tensor extra[5];
    attach(call, inputs, extra);
    if (!routing && (!recorder() || info.kind))
      return finish(call, x, y, std::move(out), accumulate);
    Tensor ids, weights;
    int64_t chosen[2] = {x.rows(), info.K};
    nb::object idObject = allocate(x, chosen, 2, Element::I32, ids);
    nb::object weightObject = allocate(x, chosen, 2, Element::F32, weights);
    call.experts_out = ids.get();
    call.weights_out = weights.get();
    nb::object result = finish(call, x, y, std::move(out), accumulate);
    if (recorder())
      record(idObject, weightObject);
    return routing ? nb::object(nb::make_tuple(result, idObject, weightObject)) : result;
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
    nb::object result = finish(call, x, y, std::move(out), accumulate);
    if (recorder())
      record(idObject, weightObject);
    return result;
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
    call.stream = x.stream();
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

  /// The inverse of setWeight for a matrix of all experts.
  void getWeight(const std::string &role, nb::handle object) {
    Tensor target;
    target.read(object, role.c_str(), /*writable=*/true);
    moec_error error;
    int code;
    {
      nb::gil_scoped_release release;
      code = moec_get_weight(library->model, number, role.c_str(), target.get(), &error);
    }
    check(code, error);
  }

  void releaseWeights() {
    moec_error error;
    check(moec_release_weights(library->model, number, &error), error);
    library->changed = true;
  }

  std::shared_ptr<Library> library;
  int32_t number;
  moec_layer_info info;
  std::string label; // what moec.trace calls it

private:
  void record(nb::handle ids, nb::handle weights) const {
    nb::object listener = nb::borrow(recorder()); // another thread may end the trace meanwhile
    if (listener.is_valid())
      listener(label, ids, weights, info.E);
  }

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
    call.stream = x.stream();
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

} // namespace moec::python

#endif // MOEC_PYTHON_LIBRARY_H
