// torch.classes.deltafx.WeightWatch: tells in one number whether any of a model's tensors was
// replaced, written to or moved to other memory. Asked before every frame, so it has to be quick:
// Python alone takes 25 us to go through the dictionaries of 160 modules.
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

// The mixing step of splitmix64 (Steele, Lea and Flood, OOPSLA 2014).
uint64_t mixed(uint64_t state, uint64_t value) {
  uint64_t z = (state ^ value) + 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

class WeightWatch : public torch::CustomClassHolder {
 public:
  // dicts: addresses of Python dictionaries, which whoever made this keeps alive, with all values
  // that they hold now: so no other object can come to lie where one of those lay.
  WeightWatch(std::vector<int64_t> dicts, std::vector<at::Tensor> tensors)
      : dicts_(std::move(dicts)), tensors_(std::move(tensors)) {
    TORCH_CHECK(dicts_.empty() || PyDict_Next != nullptr,
                "deltafx: dictionaries can only be watched where Python's functions are visible");
  }

  int64_t fingerprint() const {
    uint64_t state = tensors_.size();
    const PyGILState_STATE gil = PyGILState_Ensure();  // torch gives it up for a method
    for (const int64_t dict : dicts_) {
      Py_ssize_t at = 0;
      PyObject* value = nullptr;
      while (PyDict_Next(reinterpret_cast<PyObject*>(dict), &at, nullptr, &value))  // NOLINT
        state = mixed(state, reinterpret_cast<uintptr_t>(value));
    }
    PyGILState_Release(gil);
    for (const at::Tensor& t : tensors_) {
      state = mixed(state, reinterpret_cast<uintptr_t>(t.const_data_ptr()));
      // Inference tensors have no version, and cannot be written to outside inference mode.
      if (!t.is_inference())
        state = mixed(state, t.unsafeGetTensorImpl()->version_counter().current_version());
    }
    return static_cast<int64_t>(state);
  }

 private:
  std::vector<int64_t> dicts_;
  std::vector<at::Tensor> tensors_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(deltafx, m) {
  m.class_<WeightWatch>("WeightWatch")
      .def(torch::init<std::vector<int64_t>, std::vector<at::Tensor>>())
      .def("fingerprint",
           [](const c10::intrusive_ptr<WeightWatch>& self) { return self->fingerprint(); });
}

}  // namespace deltafx
