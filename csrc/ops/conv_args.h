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

// Everything but the prologue and the weight. `window_y` and `window_x` come from window_of.
ConvParams conv_params(const ConvArgs& args, const Window& window_y, const Window& window_x,
                       int64_t groups, bool transposed);
// Along an axis, the size of an ordinary convolution's result.
int64_t conv_size(int64_t in, const Window& w);
// Refuses an accumulator that is not of the size of an ordinary convolution's result.
void check_conv_size(const ConvParams& p);
// How a convolution is run on CUDA; the CPU's asks for nothing.
struct ConvRunning {
  bool plain = false;     // by the kernel of GPUs before Ampere on any GPU
  OptionalTensor memory;  // see schema.h
  bool listed = false;    // its candidates are in `memory`, and their number in its counts
  bool filtered = false;  // with others, see conv2d.cpp
};
// Runs it with a weight that was packed for the device of `acc`. fp32 on CUDA rounds its operands
// to tf32 where torch.backends.cudnn.allow_tf32 lets the dense convolution do so.
void run_conv(ConvParams& p, const Tensor& weight, const Tensor& acc,
              const ConvRunning& running = {});

#ifdef DELTAFX_CUDA
// weight: [cout, cin / groups, kh, kw], transposed [cin, cout / groups, kh, kw], of the dtype of
// the feature maps to be. The layout is that of cuda/conv.h.
Tensor pack_conv_weight_on_cuda(const ConvGeometry& geometry, const Tensor& weight);
#endif

}  // namespace deltafx
