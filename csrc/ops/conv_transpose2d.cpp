// deltafx::conv_transpose2d: transposed convolution + bias + residual + activation at the
// candidates, with the update rule as its epilogue.
#include "ops/conv_args.h"
#include "ops/dispatch.h"
#include "ops/schema.h"

namespace deltafx {
namespace {

template <bool kPlain>
void conv_transpose2d(const Tensor& acc, const Tensor& mask, const Tensor& counts, const Tensor& x,
                      const Tensor& x_mask, const Tensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& residual, const OptionalTensor& residual_mask,
                      at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                      at::IntArrayRef output_padding, at::IntArrayRef dilation, int64_t groups,
                      bool residual_after_act, c10::string_view act,
                      at::ArrayRef<double> act_params, const OptionalTensor& act_weight,
                      const OptionalTensor& inv_scale, const OptionalTensor& threshold,
                      c10::string_view policy, const OptionalTensor& memory) {
  const Window wy = window_of(kernel, stride, padding, dilation, 0);
  const Window wx = window_of(kernel, stride, padding, dilation, 1);
  TORCH_CHECK_VALUE(output_padding.size() == 2 && output_padding[0] >= 0 && output_padding[1] >= 0,
                    "deltafx: output_padding must have 2 elements, not negative");
  ConvParams p =
      conv_params({acc, mask, counts, x, x_mask, weight, bias, residual, residual_mask,
                   residual_after_act, act, act_params, act_weight, inv_scale, threshold, policy},
                  wy, wx, groups, /*transposed=*/true);
  const auto size = [&](int64_t in, const Window& w, int64_t extra) {
    return (in - 1) * w.stride - 2 * w.pad + w.dilation * (w.kernel - 1) + extra + 1;
  };
  const int64_t h = size(p.x.h, wy, output_padding[0]), w = size(p.x.w, wx, output_padding[1]);
  TORCH_CHECK_VALUE(p.out.acc.h == h && p.out.acc.w == w, "deltafx: the accumulator is ",
                    p.out.acc.h, " x ", p.out.acc.w, " but this transposed convolution of x gives ",
                    h, " x ", w);
  run_conv(p, weight, acc, {kPlain, memory});
}

}  // namespace

#define CONV_TRANSPOSE2D_ARGUMENTS                                                               \
  "(" DELTAFX_HEAD                                                                               \
  "Tensor x, Tensor x_mask, Tensor weight, Tensor? bias, Tensor? residual, "                     \
  "Tensor? residual_mask, int[2] kernel, int[2] stride, int[2] padding, int[2] output_padding, " \
  "int[2] dilation, int groups, bool residual_after_act, " DELTAFX_TAIL

// conv_transpose2d.plain: as conv2d.plain.
TORCH_LIBRARY_FRAGMENT(deltafx, m) {
  m.def("conv_transpose2d" CONV_TRANSPOSE2D_ARGUMENTS, {at::Tag::pt2_compliant_tag});
  m.def("conv_transpose2d.plain" CONV_TRANSPOSE2D_ARGUMENTS, {at::Tag::pt2_compliant_tag});
}
DELTAFX_IMPL(m.impl("conv_transpose2d", conv_transpose2d<false>))
#ifdef DELTAFX_CUDA
TORCH_LIBRARY_IMPL(deltafx, CUDA, m) { m.impl("conv_transpose2d.plain", conv_transpose2d<true>); }
#endif

}  // namespace deltafx
