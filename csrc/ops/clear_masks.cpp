// deltafx::clear_masks: the update masks of all slots, cleared at the start of a frame. On the CPU
// nothing is done where the last frame activated no site: its counts tell.
#include <cstring>

#include "common/checks.h"

namespace deltafx {
namespace {

void check(const Tensor& masks, const Tensor& counts) {
  TORCH_CHECK_TYPE(masks.scalar_type() == at::kBool, "deltafx: masks must be bool, not ",
                   masks.scalar_type());
  TORCH_CHECK_VALUE(masks.is_contiguous(), "deltafx: masks must be contiguous");
  TORCH_CHECK_TYPE(counts.scalar_type() == at::kLong, "deltafx: counts must be int64, not ",
                   counts.scalar_type());
  TORCH_CHECK_VALUE(counts.dim() == 2 && counts.size(1) == 2 && counts.is_contiguous(),
                    "deltafx: counts must be contiguous [nodes, 2], not ", counts.sizes());
  check_same_device(counts, masks, "counts");
}

void clear_masks_cpu(const Tensor& masks, const Tensor& counts) {
  check(masks, counts);
  const auto* rows = static_cast<const int64_t*>(counts.data_ptr());
  bool active = false;
  for (int64_t i = 0; i < counts.size(0); ++i) active |= rows[2 * i + 1] != 0;
  if (active) std::memset(masks.data_ptr(), 0, static_cast<size_t>(masks.numel()));
}

void clear_masks_cuda(const Tensor& masks, const Tensor& counts) {
  check(masks, counts);
  masks.zero_();  // whether there is anything to clear is known on the device only
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(deltafx, m) {
  m.def("clear_masks(Tensor(a!) masks, Tensor counts) -> ()", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(deltafx, CPU, m) { m.impl("clear_masks", clear_masks_cpu); }
TORCH_LIBRARY_IMPL(deltafx, CUDA, m) { m.impl("clear_masks", clear_masks_cuda); }

}  // namespace deltafx
