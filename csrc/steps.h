// Reads what a chain of steps (fastenc/convert/chain.py) is made of, where it is the usual: Linear layers and the
// activations after them, with nothing special about any. Each call of a fused model asks, as a hook or another weight
// may have come meanwhile; after a large product little of Python is left in the caches, and the same in Python takes
// 30 us there.
#pragma once

#include <pybind11/pybind11.h>

namespace fastenc {

class StepReader {
 public:
  // linear, dense: the classes of layers without and with an activation of their own (its name is `activation`).
  // tensors: the classes of weights; strided: their layout. modules: class -> (name of an attribute or None, dict from
  // its value to a name of an activation). others: function, or name of a method, -> name of an activation.
  StepReader(pybind11::object linear, pybind11::object dense, pybind11::tuple tensors, pybind11::object strided,
             pybind11::dict modules, pybind11::dict others)
      : linear_(std::move(linear)),
        dense_(std::move(dense)),
        tensors_(std::move(tensors)),
        strided_(std::move(strided)),
        modules_(std::move(modules)),
        others_(std::move(others)) {}

  // (weights, biases, names of activations) of steps that are one stack with an activation in it; else None.
  pybind11::object read(const pybind11::tuple& steps) const {
    pybind11::list weights, biases, names;
    bool activates = false, open = false;  // open: the latest layer has no activation yet
    for (const pybind11::handle step : steps) {
      PyObject* const kind = reinterpret_cast<PyObject*>(Py_TYPE(step.ptr()));
      if (kind == linear_.ptr() || kind == dense_.ptr()) {
        const pybind11::object state = plain_state(step);
        if (!state) return pybind11::none();
        const pybind11::handle parameters = item(state, parameters_);
        if (!parameters) return pybind11::none();
        const pybind11::handle weight = item(parameters, weight_), bias = item(parameters, bias_);
        if (!weight || !bias || !is_ordinary(weight) || !(bias.is_none() || is_ordinary(bias))) return pybind11::none();
        const pybind11::handle name = kind == linear_.ptr() ? pybind11::handle(identity_) : item(state, activation_);
        if (!name) return pybind11::none();
        weights.append(weight);
        biases.append(bias);
        names.append(name);
        open = PyUnicode_Compare(name.ptr(), identity_.ptr()) == 0;
        activates |= !open;
      } else {
        const pybind11::handle name = open ? activation_of(step, kind) : pybind11::handle();
        if (!name) return pybind11::none();
        names[names.size() - 1] = name;
        open = false;
        activates = true;
      }
    }
    if (!activates) return pybind11::none();
    return pybind11::make_tuple(weights, biases, names);
  }

 private:
  // A borrowed item, or null.
  static pybind11::handle item(pybind11::handle dict, pybind11::handle key) {
    PyObject* const found = PyDict_GetItemWithError(dict.ptr(), key.ptr());
    if (found == nullptr && PyErr_Occurred()) throw pybind11::error_already_set();
    return found;
  }

  // The module's attributes, if calling it does nothing but its class's forward, as is_plain in fastenc/encoder.py.
  pybind11::object plain_state(pybind11::handle module) const {
    auto state = pybind11::reinterpret_steal<pybind11::object>(PyObject_GenericGetDict(module.ptr(), nullptr));
    if (!state) throw pybind11::error_already_set();
    if (item(state, forward_) || item(state, compiled_)) return {};
    for (const pybind11::str* hooks : {&forward_hooks_, &forward_pre_hooks_, &backward_hooks_, &backward_pre_hooks_}) {
      const pybind11::handle found = item(state, *hooks);
      if (!found) return {};
      const int any = PyObject_IsTrue(found.ptr());
      if (any < 0) throw pybind11::error_already_set();
      if (any) return {};
    }
    return state;
  }

  bool is_ordinary(pybind11::handle tensor) const {
    for (const pybind11::handle kind : tensors_)
      if (reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr())) == kind.ptr())
        return pybind11::object(tensor.attr(layout_)).is(strided_);
    return false;
  }

  // The name of what a step does to a tensor, or null.
  pybind11::handle activation_of(pybind11::handle step, pybind11::handle kind) const {
    if (PyFunction_Check(step.ptr()) || PyCFunction_CheckExact(step.ptr()) || PyUnicode_CheckExact(step.ptr()))
      return item(others_, step);
    const pybind11::handle rule = item(modules_, kind);
    if (!rule) return {};
    const pybind11::object state = plain_state(step);
    if (!state) return {};
    const pybind11::handle option = PyTuple_GET_ITEM(rule.ptr(), 0), names = PyTuple_GET_ITEM(rule.ptr(), 1);
    if (option.is_none()) return item(names, option);
    const pybind11::handle value = item(state, option);
    return value ? item(names, value) : value;
  }

  pybind11::object linear_, dense_;
  pybind11::tuple tensors_;
  pybind11::object strided_;
  pybind11::dict modules_, others_;
  pybind11::str identity_{"identity"}, activation_{"activation"}, weight_{"weight"}, bias_{"bias"}, layout_{"layout"},
      parameters_{"_parameters"}, forward_{"forward"}, compiled_{"_compiled_call_impl"},
      forward_hooks_{"_forward_hooks"}, forward_pre_hooks_{"_forward_pre_hooks"}, backward_hooks_{"_backward_hooks"},
      backward_pre_hooks_{"_backward_pre_hooks"};
};

}  // namespace fastenc
