// deltafx::conv2d: convolution + bias + residual + activation at the candidates, with the update
// rule as its epilogue and, for pre-activation nets, a norm and an activation as its prologue.
#include <ATen/ops/empty.h>

#include "ops/conv_args.h"
#include "ops/dispatch.h"
#include "ops/schema.h"

namespace deltafx {
namespace {

template <bool kPlain>
void conv2d(const Tensor& acc, const Tensor& mask, const Tensor& counts, const Tensor& x,
            const Tensor& x_mask, const Tensor& weight, const OptionalTensor& bias,
            const OptionalTensor& residual, const OptionalTensor& residual_mask,
            const OptionalTensor& pre_scale, const OptionalTensor& pre_shift,
            c10::string_view pre_act, at::IntArrayRef kernel, at::IntArrayRef stride,
            at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
            bool residual_after_act, c10::string_view act, at::ArrayRef<double> act_params,
            const OptionalTensor& act_weight, const OptionalTensor& inv_scale,
            const OptionalTensor& threshold, c10::string_view policy, const OptionalTensor& memory,
            bool listed, bool filtered) {
  const Window wy = window_of(kernel, stride, padding, dilation, 0);
  const Window wx = window_of(kernel, stride, padding, dilation, 1);
  ConvParams p =
      conv_params({acc, mask, counts, x, x_mask, weight, bias, residual, residual_mask,
                   residual_after_act, act, act_params, act_weight, inv_scale, threshold, policy},
                  wy, wx, groups, /*transposed=*/false);
  check_conv_size(p);
  TORCH_CHECK_VALUE(pre_scale.has_value() == pre_shift.has_value(),
                    "deltafx: pre_scale and pre_shift go together");
  TORCH_CHECK_VALUE(pre_scale.has_value() || pre_act == "identity",
                    "deltafx: pre_act goes with pre_scale and pre_shift");
  p.pre_scale = floats_of(pre_scale, p.x.c, acc, "pre_scale");
  p.pre_shift = floats_of(pre_shift, p.x.c, acc, "pre_shift");
  p.pre_act = activation_of(pre_act, {}, {}, p.x.c);
  TORCH_CHECK_VALUE(
      !filtered || (listed && groups == 1 && p.x.h == p.out.acc.h && p.x.w == p.out.acc.w &&
                    wy.kernel == 1 && wx.kernel == 1 && !residual.has_value()),
      "deltafx: a list is filtered for 1x1 convolutions in one group, without residual, alone");
  run_conv(p, weight, acc, {kPlain, memory, listed, filtered});
}

// The schemas say what `weight` of conv2d and conv_transpose2d is only by this operator: packed for
// the device that it is on, and on CUDA for the dtype that it has.
Tensor pack_conv_weight_op(const Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
                           at::IntArrayRef dilation, int64_t groups, bool transposed) {
  TORCH_CHECK_VALUE(weight.dim() == 4, "deltafx: weight must be [O, I / groups, kh, kw], not of ",
                    weight.dim(), " dimensions");
  TORCH_CHECK_TYPE(weight.is_floating_point(), "deltafx: weight must be floating point, not ",
                   weight.scalar_type());
  TORCH_CHECK_VALUE(groups > 0 && weight.size(0) % groups == 0, "deltafx: groups must divide ",
                    weight.size(0), ", not be ", groups);
  const int64_t a = weight.size(0), b = weight.size(1) * groups;
  const int64_t kernel[] = {weight.size(2), weight.size(3)};
  const ConvGeometry geometry{window_of(kernel, stride, padding, dilation, 0),
                              window_of(kernel, stride, padding, dilation, 1),
                              transposed ? a : b,
                              transposed ? b : a,
                              groups,
                              transposed};
#ifdef DELTAFX_CUDA
  if (weight.is_cuda()) return pack_conv_weight_on_cuda(geometry, weight);
#endif
  const Tensor plain = weight.to(at::kFloat).contiguous();
  Tensor packed = at::empty({conv_weight_size(geometry)}, plain.options());
  pack_conv_weight(geometry, plain.const_data_ptr<float>(), packed.mutable_data_ptr<float>());
  return packed;
}

}  // namespace

#define CONV2D_ARGUMENTS                                                                      \
  "(" DELTAFX_HEAD                                                                            \
  "Tensor x, Tensor x_mask, Tensor weight, Tensor? bias, Tensor? residual, "                  \
  "Tensor? residual_mask, Tensor? pre_scale, Tensor? pre_shift, str pre_act, int[2] kernel, " \
  "int[2] stride, int[2] padding, int[2] dilation, int groups, bool "                         \
  "residual_after_act, " DELTAFX_ACTIVATION DELTAFX_RULE                                      \
  ", bool listed=False, bool filtered=False) -> ()"

// listed: `memory` holds the candidates and counts[0] their number, as find_candidates left them.
// filtered: the list has more sites than that; candidates are those where x is active.
// conv2d.plain runs on any GPU what conv2d does on those before Ampere.
TORCH_LIBRARY_FRAGMENT(deltafx, m) {
  m.def("conv2d" CONV2D_ARGUMENTS, {at::Tag::pt2_compliant_tag});
  m.def("conv2d.plain" CONV2D_ARGUMENTS, {at::Tag::pt2_compliant_tag});
  m.def(
      "pack_conv_weight(Tensor weight, int[2] stride, int[2] padding, int[2] dilation, "
      "int groups, bool transposed) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}
DELTAFX_IMPL(m.impl("conv2d", conv2d<false>); m.impl("pack_conv_weight", pack_conv_weight_op))
#ifdef DELTAFX_CUDA
TORCH_LIBRARY_IMPL(deltafx, CUDA, m) { m.impl("conv2d.plain", conv2d<true>); }
#endif

}  // namespace deltafx
