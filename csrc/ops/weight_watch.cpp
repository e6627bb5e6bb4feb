// torch.classes.deltafx.WeightWatch: tells whether any of a model's tensors was replaced, written
// to or moved to other memory. Asked before every frame, so it has to be quick: Python alone takes
// 25 us to go through the dictionaries of 160 modules.
#include <Python.h>

#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <cstdint>
#include <utility>
#include <vector>

// Of the stable ABI, and there wherever a watch is made; a process without Python loads this
// library as well.
#pragma weak PyDict_Next
#pragma weak PyGILState_Ensure
#pragma weak PyGILState_Release

namespace deltafx {
namespace {

class WeightWatch : public torch::CustomClassHolder {
 public:
  // dicts: addresses of Python dictionaries, which whoever made this keeps alive, with all values
  // that they hold now: so no other object can come to lie where one of those lay.
  WeightWatch(std::vector<int64_t> dicts, std::vector<at::Tensor> tensors)
      : dicts_(std::move(dicts)), tensors_(std::move(tensors)) {
    TORCH_CHECK(dicts_.empty() || PyDict_Next != nullptr,
                "deltafx: dictionaries can only be watched where Python's functions are visible");
    visit([this](uintptr_t word) {
      seen_.push_back(word);
      return true;
    });
  }

  // Whether all is as it was when this was made.
  bool holds() const {
    const uintptr_t* next = seen_.data();
    const uintptr_t* const end = next + seen_.size();
    return visit([&](uintptr_t word) { return next != end && *next++ == word; }) && next == end;
  }

 private:
  // Calls f for all that there is to tell, in one order, for as long as it returns true.
  template <class F>
  bool visit(const F& f) const {
    if (!visit_dicts(f)) return false;
    for (const at::Tensor& t : tensors_) {
      if (!f(reinterpret_cast<uintptr_t>(t.const_data_ptr()))) return false;
      // Inference tensors have no version, and cannot be written to outside inference mode.
      if (!t.is_inference() && !f(t.unsafeGetTensorImpl()->version_counter().current_version()))
        return false;
    }
    return true;
  }

  template <class F>
  bool visit_dicts(const F& f) const {
    if (dicts_.empty()) return true;
    const PyGILState_STATE gil = PyGILState_Ensure();  // torch gives it up for a method
    bool goes_on = true;
    for (const int64_t dict : dicts_) {
      auto* object = reinterpret_cast<PyObject*>(dict);  // NOLINT: id() of it
      Py_ssize_t at = 0;
      PyObject* value = nullptr;
      while (goes_on && PyDict_Next(object, &at, nullptr, &value))
        goes_on = f(reinterpret_cast<uintptr_t>(value));
    }
    PyGILState_Release(gil);
    return goes_on;
  }

  std::vector<int64_t> dicts_;
  std::vector<at::Tensor> tensors_;
  std::vector<uintptr_t> seen_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(deltafx, m) {
  m.class_<WeightWatch>("WeightWatch")
      .def(torch::init<std::vector<int64_t>, std::vector<at::Tensor>>())
      .def("holds", &WeightWatch::holds);
}

}  // namespace deltafx
