// fastenc._C.build_info(): how the extensions were built. In a file of its own, as each commit compiles it anew.
#include <Python.h>

namespace fastenc {

namespace {

struct Fact {
  const char* name;
  const char* value;
};

#define FACT(name, value) {#name, value},
constexpr Fact kFacts[] = {
    FACT(cxx_version, __VERSION__)  //
#include "build_info.inc"           // written by setup.py
};
#undef FACT

}  // namespace

// A dict of str; a fact that is not known is not in it. Python's own C functions are enough for it and, unlike
// pybind11, serve every Python with one build.
PyObject* build_info(PyObject*, PyObject*) {
  PyObject* info = PyDict_New();
  for (const Fact& fact : kFacts) {
    PyObject* value = info ? PyUnicode_FromString(fact.value) : nullptr;
    if (!value || PyDict_SetItemString(info, fact.name, value) < 0) Py_CLEAR(info);
    Py_XDECREF(value);
  }
  return info;
}

}  // namespace fastenc
