// fastenc._C as a Python module: the training engine (cpu/train.h), the reader of steps (steps.h), and how the
// extensions were built. It knows no torch: tensors come as addresses, which fastenc/training/engine.py takes from
// tensors that it has checked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "build_info.h"
#include "cpu/runtime.h"
#include "cpu/train.h"
#include "steps.h"

namespace {

namespace py = pybind11;
using namespace fastenc;

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Holds what the engine's arguments point to.
class TrainingEngine {
 public:
  TrainingEngine(std::vector<TrainLayer> layers, std::vector<Group> groups, bool bfloat16, int64_t batch_size,
                 int64_t loss, int64_t optimizer, double l1, double clip_norm, double clip_value)
      : layers_(std::move(layers)),
        groups_(std::move(groups)),
        args_{bfloat16 ? Dtype::kBFloat16 : Dtype::kFloat,
              static_cast<int64_t>(layers_.size()),
              layers_.data(),
              batch_size,
              static_cast<LossKind>(loss),
              static_cast<OptimizerKind>(optimizer),
              static_cast<int64_t>(groups_.size()),
              groups_.data(),
              l1,
              clip_norm,
              clip_value},
        engine_(kernels().engine),
        training_(engine_.create(args_)) {}
  TrainingEngine(const TrainingEngine&) = delete;
  ~TrainingEngine() { engine_.destroy(training_); }

  int64_t run(uintptr_t x, int64_t x_stride, uintptr_t target, int64_t target_stride, uintptr_t labels,
              uintptr_t weights, uintptr_t order, int64_t rows, uintptr_t rates, uint64_t seed, int64_t first_step,
              uintptr_t losses) {
    const TrainCall call = {
        at<float>(x),       x_stride, at<float>(target), target_stride, at<int64_t>(labels), at<float>(weights),
        at<int64_t>(order), rows,     at<double>(rates), seed,          first_step,          at<double>(losses)};
    const Runtime borrowed = runtime();
    const py::gil_scoped_release release;
    return engine_.run(training_, call, borrowed);
  }

 private:
  std::vector<TrainLayer> layers_;
  std::vector<Group> groups_;
  TrainArgs args_;
  Engine engine_;
  void* training_;
};

py::dict build_info_dict() {
  py::dict info;
  for (const auto& [name, value] : build_info()) info[name] = value;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The CPU kernels: importing registers the operators fastenc_cpu::*.";
  m.def("leaves_to_aten", leaves_to_aten, py::arg("M"), py::arg("N"), py::arg("K"), py::arg("training"),
        py::arg("in_stack"), "Whether a layer of fp32 is left to ATen; see csrc/cpu/runtime.h.");
  m.def("leaves_steps_to_aten", leaves_steps_to_aten, py::arg("batch"), py::arg("N"), py::arg("K"),
        "Whether steps with such a layer, of fp32, are left to ATen; see csrc/cpu/runtime.h.");
  m.def("build_info", build_info_dict, "How the extensions were built: a dict of str.");

  py::class_<StepReader>(m, "StepReader", "Reads the steps of a chain; see csrc/steps.h.")
      .def(py::init<py::object, py::object, py::tuple, py::object, py::dict, py::dict>(), py::kw_only(),
           py::arg("linear"), py::arg("dense"), py::arg("tensors"), py::arg("strided"), py::arg("modules"),
           py::arg("others"))
      .def("read", &StepReader::read, py::arg("steps"),
           "(weights, biases, activations) of steps that are one stack with an activation in it; else None.");

  py::class_<Parameter>(m, "Parameter", "A weight or bias of fp32, as addresses; see csrc/cpu/train.h.")
      .def(py::init([](uintptr_t value, bool trained, int64_t group, std::vector<uintptr_t> moments, uintptr_t steps,
                       uintptr_t grad) {
             Parameter parameter = {at<float>(value), trained, group, {}, at<float>(steps), at<float>(grad)};
             if (moments.size() > 2) throw py::value_error("a parameter has at most two moments");
             for (size_t i = 0; i < moments.size(); ++i) parameter.moments[i] = at<float>(moments[i]);
             return parameter;
           }),
           py::kw_only(), py::arg("value") = 0, py::arg("trained") = false, py::arg("group") = 0,
           py::arg("moments") = std::vector<uintptr_t>(), py::arg("steps") = 0, py::arg("grad") = 0);

  py::class_<TrainLayer>(m, "Layer", "A dense layer, act(x @ weight.T + bias), and dropout of its output.")
      .def(py::init([](int64_t in_features, int64_t out_features, int64_t activation, double dropout, Parameter weight,
                       Parameter bias) {
             return TrainLayer{in_features, out_features, static_cast<ActivationKind>(activation),
                               dropout,     weight,       bias};
           }),
           py::kw_only(), py::arg("in_features"), py::arg("out_features"), py::arg("activation"), py::arg("dropout"),
           py::arg("weight"), py::arg("bias"));

  py::class_<Group>(m, "Group", "Options of the optimiser that a group of parameters shares.")
      .def(py::init([](double beta1, double beta2, double eps, double momentum, double weight_decay, bool nesterov) {
             return Group{beta1, beta2, eps, momentum, weight_decay, nesterov};
           }),
           py::kw_only(), py::arg("beta1") = 0.0, py::arg("beta2") = 0.0, py::arg("eps") = 0.0,
           py::arg("momentum") = 0.0, py::arg("weight_decay") = 0.0, py::arg("nesterov") = false);

  py::class_<TrainingEngine>(m, "TrainingEngine",
                             "Takes whole training steps. All that is given by address must outlive it.")
      .def(py::init<std::vector<TrainLayer>, std::vector<Group>, bool, int64_t, int64_t, int64_t, double, double,
                    double>(),
           py::kw_only(), py::arg("layers"), py::arg("groups"), py::arg("bfloat16"), py::arg("batch_size"),
           py::arg("loss"), py::arg("optimizer"), py::arg("l1"), py::arg("clip_norm"), py::arg("clip_value"))
      .def("run", &TrainingEngine::run, py::kw_only(), py::arg("x"), py::arg("x_stride"), py::arg("target"),
           py::arg("target_stride"), py::arg("labels"), py::arg("weights"), py::arg("order"), py::arg("rows"),
           py::arg("rates"), py::arg("seed"), py::arg("first_step"), py::arg("losses"),
           "Takes the steps of `rows` rows, as TrainCall in csrc/cpu/train.h, without the GIL. Returns how many it "
           "took: fewer than all where a loss is not finite.");
}
