// Shared by conv2d and conv_transpose2d: their arguments, checked, as plain parameters.
#pragma once

#include "common/checks.h"
#include "cpu/conv.h"

namespace deltafx {

struct ConvArgs {
  const Tensor& acc;
  const Tensor& mask;
  const Tensor& counts;
  const Tensor& x;
  const Tensor& x_mask;
  const Tensor& weight;
  const OptionalTensor& bias;
  const OptionalTensor& residual;
  const OptionalTensor& residual_mask;
  bool residual_after_act;
  std::string_view act;
  c10::ArrayRef<double> act_params;
  const OptionalTensor& act_weight;
  const OptionalTensor& inv_scale;
  const OptionalTensor& threshold;
  std::string_view policy;
};

// Everything but the prologue. `window_y` and `window_x` come from window_of.
ConvParams conv_params(const ConvArgs& args, const Window& window_y, const Window& window_x,
                       int64_t groups, bool transposed);

}  // namespace deltafx
