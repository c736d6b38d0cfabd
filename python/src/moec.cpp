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
//===----------------------------------------------------------------------===//

#include "Executors.h"
#include "Library.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

using namespace moec::python;

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

  nb::class_<OpenMP>(m, "OpenMP",
                     "An executor over an OpenMP runtime that this process has loaded already, as "
                     "torch's: see moec.transformers.torch_executor. Makes no promise (gang 0).")
      .def(nb::init<const std::string &, int>(), "path"_a, "lanes"_a = 0,
           "path: of the runtime's library. lanes: tasks at once; 0: omp_get_max_threads().")
      .def_prop_ro("lanes", [](const OpenMP &p) { return p.executor.lanes; })
      .def_prop_ro("__moec_executor__",
                   [](const OpenMP &p) { return nb::capsule(&p.executor, "moec_executor"); })
      .def("__reduce__", [](nb::handle self) {
        const OpenMP &p = nb::cast<const OpenMP &>(self);
        return nb::make_tuple(self.type(), nb::make_tuple(p.path, p.lanes));
      });

  m.def(
      "set_recorder",
      [](nb::object listener) {
        PyObject *old = recorder();
        recorder() = listener.is_none() ? nullptr : listener.release().ptr();
        return old ? nb::steal(old) : nb::none();
      },
      "listener"_a.none(),
      "Calls listener(label, ids, weights, E) after every call of a MoE layer; returns the "
      "listener "
      "before. For moec.trace.");

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
      .def("__repr__",
           [](const Layers &l) {
             return "<moec.Layers, " + std::to_string(l.library->count()) + " of them>";
           })
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
          [](Layer &l, nb::handle x, nb::object out, bool accumulate, bool routing,
             nb::object tokenIds, nb::object tokenTypes, nb::object sequences, nb::object routerX,
             nb::object state) {
            return l.call(x, std::move(out), accumulate, routing,
                          {std::move(routerX), std::move(tokenIds), std::move(tokenTypes),
                           std::move(sequences), std::move(state)});
          },
          "x"_a.none(), nb::kw_only(), "out"_a = nb::none(), "accumulate"_a = false,
          "routing"_a = false, "token_ids"_a = nb::none(), "token_types"_a = nb::none(),
          "sequences"_a = nb::none(), "router_x"_a = nb::none(), "state"_a = nb::none(),
          "y [..., H] = the layer of x [..., H].\n\n"
          "out: written instead of a new tensor; f32 or bf16, may not overlap x.\n"
          "accumulate: out += the layer of x.\n"
          "routing: (y, ids, weights) instead, as route gives them.\n"
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
      .def("get_weight", &Layer::getWeight, "role"_a, "out"_a.none(),
           "Unpacks a matrix of all experts into out, f32 or bf16: role \"gate\", \"up\", "
           "\"gate_up\" or \"down\".")
      .def("release_weights", &Layer::releaseWeights,
           "Frees the memory of the layer's weights, which all have to be set again. Only with "
           "load=\"none\".")
      .def_rw("label", &Layer::label, "The name under which moec.trace records the layer.")
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
      .def_ro("changed", &Library::changed, "Whether a weight was set from memory.")
      .def_prop_ro(
          "arguments", [](const Library &l) { return l.arguments; }, "What moec.load was given.")
      .def_prop_ro("path", [](const Library &l) { return l.arguments["dir"]; })
      .def("check_device", &Library::checkDevice,
           "On a GPU, after synchronising: raises what the device has reported since the last "
           "check, as an expert id that does not exist. On the CPU calls report everything.")
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
