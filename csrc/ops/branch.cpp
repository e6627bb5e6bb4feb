// deltafx::branch: chooses on the device how a frame that is being captured as a CUDA graph goes
// on. CUDA only.
#ifdef DELTAFX_CUDA
#include "cuda/branch.h"
#endif
#include "ops/dispatch.h"

namespace deltafx {

#ifdef DELTAFX_CUDA
namespace {

void branch(const Tensor& state, at::TensorList masks, bool may_skip, double dense_above,
            at::IntArrayRef bodies) {
  static_assert(sizeof(cuda::BranchState) == 4 * sizeof(int32_t));
  TORCH_CHECK_TYPE(state.scalar_type() == at::kInt && state.numel() == 4 && state.is_contiguous() &&
                       state.storage_offset() % 2 == 0,
                   "deltafx: state must be four int32 at a multiple of 8 bytes, not ",
                   state.sizes(), " of ", state.scalar_type());
  TORCH_CHECK_VALUE(!masks.empty() && masks.size() <= cuda::kMostInputs,
                    "deltafx: a frame has 1 to ", cuda::kMostInputs, " inputs here, not ",
                    masks.size());
  TORCH_CHECK_VALUE(bodies.size() == 1 || bodies.size() == 2,
                    "deltafx: there are one or two bodies, not ", bodies.size());
  cuda::BranchParams p{};
  for (const Tensor& mask : masks) {
    check_same_device(mask, state, "a mask");
    TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool && mask.dim() == 3 && mask.is_contiguous(),
                     "deltafx: a mask must be bool [N, H, W], contiguous, not ", mask.sizes(),
                     " of ", mask.scalar_type());
    p.masks[p.inputs++] = {static_cast<uint8_t*>(mask.data_ptr()), mask.size(0), mask.size(1),
                           mask.size(2)};
  }
  p.may_skip = may_skip;
  p.dense_above = static_cast<float>(dense_above);
  p.state = static_cast<cuda::BranchState*>(state.data_ptr());
  cudaGraph_t graphs[2] = {};
  for (size_t i = 0; i < bodies.size(); ++i)
    graphs[i] = reinterpret_cast<cudaGraph_t>(bodies[i]);  // NOLINT: how torch hands graphs out
  run_on_cuda(state, [&](cudaStream_t stream) {
    return cuda::branch(p, graphs, static_cast<int>(bodies.size()), stream);
  });
}

}  // namespace
#endif

TORCH_LIBRARY_FRAGMENT(deltafx, m) {
  m.def(
      "branch(Tensor(a!) state, Tensor[] masks, bool may_skip, float dense_above, int[] bodies) -> "
      "()",
      {at::Tag::pt2_compliant_tag});
}
#ifdef DELTAFX_CUDA
TORCH_LIBRARY_IMPL(deltafx, CUDA, m) { m.impl("branch", branch); }
#endif

}  // namespace deltafx
