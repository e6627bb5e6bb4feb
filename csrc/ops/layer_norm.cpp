// deltafx::layer_norm: normalizes the channels of each site (the channels_last layer norm of
// ConvNeXt), y = act((x - mean) / sqrt(var + eps) * weight[c] + bias[c]).
#include "ops/dispatch.h"
#include "ops/schema.h"

namespace deltafx {
namespace {

void layer_norm(const Tensor& acc, const Tensor& mask, const Tensor& counts, const Tensor& x,
                const Tensor& x_mask, const OptionalTensor& weight, const OptionalTensor& bias,
                double eps, c10::string_view act, c10::ArrayRef<double> act_params,
                const OptionalTensor& act_weight, const OptionalTensor& inv_scale,
                const OptionalTensor& threshold, c10::string_view policy,
                const OptionalTensor& memory) {
  LayerNormParams p{};
  p.out = output_of(acc, mask, counts, inv_scale, threshold, policy);
  check_dtype_on(acc, p.out.acc.dtype);
  p.act = activation_of(act, act_params, act_weight, p.out.acc.c);
  p.x = input_like(x, x_mask, acc, true);
  p.weight = floats_of(weight, p.out.acc.c, acc, "weight");
  p.bias = floats_of(bias, p.out.acc.c, acc, "bias");
  p.eps = static_cast<float>(eps);
  DELTAFX_RUN(layer_norm, p, acc, memory);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(deltafx, m) {
  m.def("layer_norm(" DELTAFX_HEAD
        "Tensor x, Tensor x_mask, Tensor? weight, Tensor? bias, float eps, " DELTAFX_TAIL,
        {at::Tag::pt2_compliant_tag});
}
DELTAFX_IMPL(m.impl("layer_norm", layer_norm))

}  // namespace deltafx
