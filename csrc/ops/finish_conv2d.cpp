// deltafx::finish_conv2d: bias, residual and activation of a convolution that was computed at every
// site, by cuDNN, for a frame that changed everywhere. CUDA only: elsewhere no frame is computed
// so.
#ifdef DELTAFX_CUDA
#include "cuda/finish_conv2d.h"
#endif
#include "ops/dispatch.h"
#include "ops/schema.h"

namespace deltafx {

#ifdef DELTAFX_CUDA
namespace {

void finish_conv2d(const Tensor& acc, const Tensor& not_finite, const Tensor& y,
                   const OptionalTensor& bias, const OptionalTensor& residual,
                   bool residual_after_act, c10::string_view act, c10::ArrayRef<double> act_params,
                   const OptionalTensor& act_weight) {
  cuda::FinishParams p{};
  p.acc = feature_map(acc, "acc");
  p.y = map_like(y, acc, "y");
  p.bias = floats_of(bias, p.acc.c, acc, "bias");
  if (residual.has_value()) p.residual = map_like(*residual, acc, "residual");
  p.residual_after_act = residual_after_act;
  p.act = activation_of(act, act_params, act_weight, p.acc.c);
  check_same_device(not_finite, acc, "not_finite");
  TORCH_CHECK_TYPE(not_finite.scalar_type() == at::kInt && not_finite.numel() == 1,
                   "deltafx: not_finite must be one int32, not ", not_finite.sizes(), " of ",
                   not_finite.scalar_type());
  p.not_finite = static_cast<int32_t*>(not_finite.data_ptr());
  run_on_cuda(acc, [&](cudaStream_t stream) { return cuda::finish_conv2d(p, stream); });
}

}  // namespace
#endif

TORCH_LIBRARY_FRAGMENT(deltafx, m) {
  m.def(
      "finish_conv2d(Tensor(a!) acc, Tensor(b!) not_finite, Tensor y, Tensor? bias, "
      "Tensor? residual, bool residual_after_act, str act, float[] act_params, "
      "Tensor? act_weight) -> ()",
      {at::Tag::pt2_compliant_tag});
}
#ifdef DELTAFX_CUDA
TORCH_LIBRARY_IMPL(deltafx, CUDA, m) { m.impl("finish_conv2d", finish_conv2d); }
#endif

}  // namespace deltafx
