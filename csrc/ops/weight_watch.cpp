// torch.classes.deltafx.WeightWatch: tells in one number whether any of the tensors that it holds
// was written to or moved to other memory. Asked before every frame for all weights of a model, so
// it has to be quick: as an operator, the list alone would take 40 us for 300 tensors.
#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <cstdint>
#include <utility>
#include <vector>

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
  explicit WeightWatch(std::vector<at::Tensor> tensors) : tensors_(std::move(tensors)) {}

  int64_t fingerprint() const {
    uint64_t state = tensors_.size();
    for (const at::Tensor& t : tensors_) {
      state = mixed(state, reinterpret_cast<uintptr_t>(t.const_data_ptr()));
      // Inference tensors have no version, and cannot be written to outside inference mode.
      if (!t.is_inference())
        state = mixed(state, t.unsafeGetTensorImpl()->version_counter().current_version());
    }
    return static_cast<int64_t>(state);
  }

 private:
  std::vector<at::Tensor> tensors_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(deltafx, m) {
  m.class_<WeightWatch>("WeightWatch")
      .def(torch::init<std::vector<at::Tensor>>())
      .def("fingerprint",
           [](const c10::intrusive_ptr<WeightWatch>& self) { return self->fingerprint(); });
}

}  // namespace deltafx
