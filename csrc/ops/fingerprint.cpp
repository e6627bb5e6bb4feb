// deltafx::fingerprint: one number for where tensors lie and how often they were written in place,
// to see whether any of them has changed since. A frame asks this of hundreds of weights.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

namespace deltafx {
namespace {

uint64_t mixed(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0x9e3779b97f4a7c15u;
  return hash ^ (hash >> 29);
}

int64_t fingerprint(at::TensorList tensors) {
  uint64_t hash = tensors.size();
  for (const at::Tensor& t : tensors) {
    const auto& impl = *t.unsafeGetTensorImpl();
    const void* memory = impl.has_storage() ? impl.unsafe_storage().data() : &impl;
    hash = mixed(hash, reinterpret_cast<uintptr_t>(memory));
    hash = mixed(hash, static_cast<uint64_t>(t.has_storage() ? t.storage_offset() : 0));
    // Inference tensors cannot be written to outside inference mode, and have no version.
    if (!t.is_inference()) hash = mixed(hash, t._version());
  }
  return static_cast<int64_t>(hash);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(deltafx, m) {
  m.def("fingerprint(Tensor[] tensors) -> int", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(deltafx, CompositeImplicitAutograd, m) { m.impl("fingerprint", fingerprint); }

}  // namespace deltafx
