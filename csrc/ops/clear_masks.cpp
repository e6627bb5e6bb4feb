// deltafx::clear_masks: the update masks of all slots and the counts of all nodes, cleared at the
// start of a frame. On the CPU the masks are left alone where the last frame activated no site: its
// counts tell.
#include <cstring>

#include "ops/frame_args.h"

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
  auto* rows = static_cast<int64_t*>(counts.data_ptr());
  bool active = false;
  for (int64_t i = 0; i < counts.size(0); ++i) active |= rows[2 * i + 1] != 0;
  if (active) std::memset(masks.data_ptr(), 0, static_cast<size_t>(masks.numel()));
  std::memset(rows, 0, static_cast<size_t>(counts.numel()) * sizeof(int64_t));
}

#ifdef DELTAFX_CUDA
void clear_masks_cuda(const Tensor& masks, const Tensor& counts) {
  const cuda::Arenas arenas = arenas_of(masks, counts);
  run_on_cuda(masks, [&](cudaStream_t stream) { return cuda::clear_masks(arenas, stream); });
}
#endif

}  // namespace

#ifdef DELTAFX_CUDA
cuda::Arenas arenas_of(const Tensor& masks, const Tensor& counts) {
  check(masks, counts);
  return {static_cast<uint8_t*>(masks.data_ptr()), masks.numel(),
          static_cast<int64_t*>(counts.data_ptr()), counts.size(0)};
}
#endif

TORCH_LIBRARY_FRAGMENT(deltafx, m) {
  m.def("clear_masks(Tensor(a!) masks, Tensor(b!) counts) -> ()", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(deltafx, CPU, m) { m.impl("clear_masks", clear_masks_cpu); }
#ifdef DELTAFX_CUDA
TORCH_LIBRARY_IMPL(deltafx, CUDA, m) { m.impl("clear_masks", clear_masks_cuda); }
#endif

}  // namespace deltafx
