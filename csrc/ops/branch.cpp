// deltafx::branch, deltafx::begin_frame, deltafx::otherwise: how a frame that is being captured as
// a CUDA graph goes on is chosen on the device; see cuda/branch.h. CUDA only.
#include "ops/frame_args.h"

namespace deltafx {

#ifdef DELTAFX_CUDA
namespace {

cuda::BranchState* state_of(const Tensor& state) {
  static_assert(sizeof(cuda::BranchState) == 6 * sizeof(int32_t));
  TORCH_CHECK_TYPE(state.scalar_type() == at::kInt && state.numel() == 6 && state.is_contiguous() &&
                       state.storage_offset() % 2 == 0,
                   "deltafx: state must be six int32 at a multiple of 8 bytes, not ", state.sizes(),
                   " of ", state.scalar_type());
  return static_cast<cuda::BranchState*>(state.data_ptr());
}

cuda::BranchParams branch_params(const Tensor& state, at::TensorList masks, bool may_skip,
                                 bool has_everywhere, double dense_above) {
  cuda::BranchParams p{};
  p.state = state_of(state);
  TORCH_CHECK_VALUE(!masks.empty() && masks.size() <= cuda::kMostInputs,
                    "deltafx: a frame has 1 to ", cuda::kMostInputs, " inputs here, not ",
                    masks.size());
  for (const Tensor& mask : masks) {
    check_same_device(mask, state, "a mask");
    TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool && mask.dim() == 3 && mask.is_contiguous(),
                     "deltafx: a mask must be bool [N, H, W], contiguous, not ", mask.sizes(),
                     " of ", mask.scalar_type());
    p.masks[p.inputs++] = {static_cast<uint8_t*>(mask.data_ptr()), mask.size(0), mask.size(1),
                           mask.size(2)};
  }
  p.may_skip = may_skip;
  p.has_everywhere = has_everywhere;
  p.dense_above = static_cast<float>(dense_above);
  return p;
}

cudaGraph_t graph_of(int64_t raw) {
  return reinterpret_cast<cudaGraph_t>(raw);  // NOLINT: how torch hands graphs out
}

void branch(const Tensor& state, at::TensorList masks, bool may_skip, double dense_above,
            at::IntArrayRef bodies) {
  TORCH_CHECK_VALUE(bodies.size() == 1 || bodies.size() == 2,
                    "deltafx: there are one or two bodies, not ", bodies.size());
  const cuda::BranchParams p =
      branch_params(state, masks, may_skip, bodies.size() > 1, dense_above);
  cudaGraph_t graphs[2] = {};
  for (size_t i = 0; i < bodies.size(); ++i) graphs[i] = graph_of(bodies[i]);
  run_on_cuda(state, [&](cudaStream_t stream) {
    return cuda::branch(p, graphs, static_cast<int>(bodies.size()), stream);
  });
}

bool begins_frame(const Tensor& acc, const Tensor& mask, const Tensor& counts, const Tensor& x,
                  int64_t block, const OptionalTensor& inv_scale, const OptionalTensor& threshold,
                  c10::string_view policy, const Tensor& masks, const Tensor& all_counts) {
  return cuda::begins_frame(
      encode_params(acc, mask, counts, x, block, inv_scale, threshold, policy),
      arenas_of(masks, all_counts));
}

// Returns the handle for `otherwise`, and the node that reads x, as last_node does.
std::tuple<int64_t, int64_t> begin_frame(const Tensor& acc, const Tensor& mask,
                                         const Tensor& counts, const Tensor& x, int64_t block,
                                         const OptionalTensor& inv_scale,
                                         const OptionalTensor& threshold, c10::string_view policy,
                                         const Tensor& masks, const Tensor& all_counts,
                                         const Tensor& state, bool may_skip, bool has_everywhere,
                                         double dense_above) {
  const EncodeParams p = encode_params(acc, mask, counts, x, block, inv_scale, threshold, policy);
  const cuda::Arenas arenas = arenas_of(masks, all_counts);
  TORCH_CHECK_NOT_IMPLEMENTED(cuda::begins_frame(p, arenas),
                              "deltafx: no kernel begins such a frame; see begins_frame");
  const cuda::BranchParams b = branch_params(state, mask, may_skip, has_everywhere, dense_above);
  unsigned long long handle = 0;
  run_on_cuda(
      acc, [&](cudaStream_t stream) { return cuda::begin_frame(p, arenas, b, &handle, stream); });
  return {static_cast<int64_t>(handle), last_node(acc)};
}

void otherwise(const Tensor& state, int64_t handle, int64_t everywhere) {
  run_on_cuda(state, [&](cudaStream_t stream) {
    return cuda::otherwise(static_cast<unsigned long long>(handle), graph_of(everywhere), stream);
  });
}

void tell(const Tensor& state, const Tensor& told) {
  TORCH_CHECK_TYPE(
      told.scalar_type() == at::kInt && told.numel() == 1 && told.is_cpu() && told.is_pinned(),
      "deltafx: told must be one int32 in pinned memory, not ", told.sizes(), " of ",
      told.scalar_type());
  run_on_cuda(state, [&](cudaStream_t stream) {
    return cuda::tell(state_of(state), static_cast<int32_t*>(told.data_ptr()), stream);
  });
}

}  // namespace
#endif

TORCH_LIBRARY_FRAGMENT(deltafx, m) {
  m.def(
      "branch(Tensor(a!) state, Tensor[] masks, bool may_skip, float dense_above, int[] bodies) -> "
      "()",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "begins_frame(Tensor acc, Tensor mask, Tensor counts, Tensor x, int block, "
      "Tensor? inv_scale, Tensor? threshold, str policy, Tensor masks, Tensor all_counts) -> bool",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "begin_frame(Tensor(a!) acc, Tensor(b!) mask, Tensor(c!) counts, Tensor x, int block, "
      "Tensor? inv_scale, Tensor? threshold, str policy, Tensor(d!) masks, Tensor(e!) all_counts, "
      "Tensor(f!) state, bool may_skip, bool has_everywhere, float dense_above) -> (int, int)",
      {at::Tag::pt2_compliant_tag});
  m.def("tell(Tensor state, Tensor(a!) told) -> ()", {at::Tag::pt2_compliant_tag});
  m.def("otherwise(Tensor state, int handle, int everywhere) -> ()", {at::Tag::pt2_compliant_tag});
}
#ifdef DELTAFX_CUDA
TORCH_LIBRARY_IMPL(deltafx, CUDA, m) {
  m.impl("branch", branch);
  m.impl("begins_frame", begins_frame);
  m.impl("begin_frame", begin_frame);
  m.impl("otherwise", otherwise);
  m.impl("tell", tell);
}
#endif

}  // namespace deltafx
