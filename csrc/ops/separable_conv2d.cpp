// deltafx::separable_conv2d: a depthwise convolution and the pointwise one that is its only reader,
// as one op: what lies between them is never stored. CPU only.
#include "ops/conv_args.h"
#include "ops/dispatch.h"

namespace deltafx {
namespace {

void separable_conv2d(const Tensor& acc, const Tensor& mask, const Tensor& counts, const Tensor& x,
                      const Tensor& x_mask, const Tensor& depthwise_weight,
                      const OptionalTensor& depthwise_bias, c10::string_view depthwise_act,
                      const Tensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& residual, const OptionalTensor& residual_mask,
                      at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                      at::IntArrayRef dilation, bool residual_after_act, c10::string_view act,
                      at::ArrayRef<double> act_params, const OptionalTensor& act_weight,
                      const OptionalTensor& inv_scale, const OptionalTensor& threshold,
                      c10::string_view policy) {
  const Window wy = window_of(kernel, stride, padding, dilation, 0);
  const Window wx = window_of(kernel, stride, padding, dilation, 1);
  ConvParams p =
      conv_params({acc, mask, counts, x, x_mask, weight, bias, residual, residual_mask,
                   residual_after_act, act, act_params, act_weight, inv_scale, threshold, policy},
                  wy, wx, /*groups=*/1, /*transposed=*/false);
  check_conv_size(p);
  TORCH_CHECK_VALUE(p.x.c > 1, "deltafx: separable_conv2d needs two channels or more");
  p.depthwise.weight =
      floats_of(depthwise_weight, wy.kernel * wx.kernel * p.x.c, acc, "depthwise_weight");
  p.depthwise.bias = floats_of(depthwise_bias, p.x.c, acc, "depthwise_bias");
  p.depthwise.act = activation_of(depthwise_act, {}, {}, p.x.c);
  run_conv(p, weight, acc);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(deltafx, m) {
  m.def(
      "separable_conv2d(Tensor(a!) acc, Tensor(b!) mask, Tensor(c!) counts, Tensor x, "
      "Tensor x_mask, Tensor depthwise_weight, Tensor? depthwise_bias, str depthwise_act, "
      "Tensor weight, Tensor? bias, Tensor? residual, Tensor? residual_mask, int[2] kernel, "
      "int[2] stride, int[2] padding, int[2] dilation, bool residual_after_act, str act, "
      "float[] act_params, Tensor? act_weight, Tensor? inv_scale, Tensor? threshold, "
      "str policy) -> ()",
      {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(deltafx, CPU, m) { m.impl("separable_conv2d", separable_conv2d); }

}  // namespace deltafx
