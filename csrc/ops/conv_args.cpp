#include "ops/conv_args.h"

#include "ops/dispatch.h"

#ifdef DELTAFX_CUDA
#include <ATen/Context.h>

#include "cuda/conv.h"
#endif

namespace deltafx {

ConvParams conv_params(const ConvArgs& args, const Window& window_y, const Window& window_x,
                       int64_t groups, bool transposed) {
  ConvParams p{};
  p.out = output_of(args.acc, args.mask, args.counts, args.inv_scale, args.threshold, args.policy);
  check_dtype_on(args.acc, p.out.acc.dtype);
  check_same_device(args.x, args.acc, "x");
  p.x = feature_map(args.x, "x");
  TORCH_CHECK_TYPE(p.x.dtype == p.out.acc.dtype, "deltafx: x is ", args.x.scalar_type(),
                   " but the accumulator is ", args.acc.scalar_type());
  TORCH_CHECK_VALUE(p.x.n == p.out.acc.n, "deltafx: x has ", p.x.n,
                    " streams but the accumulator has ", p.out.acc.n);
  check_same_device(args.x_mask, args.acc, "x_mask");
  p.x_mask = mask_of(args.x_mask, p.x, "x_mask");
  TORCH_CHECK_VALUE(groups > 0 && p.x.c % groups == 0 && p.out.acc.c % groups == 0,
                    "deltafx: groups must divide the channels of x (", p.x.c,
                    ") and of the accumulator (", p.out.acc.c, "), not be ", groups);
  p.geometry = {window_y, window_x, p.x.c, p.out.acc.c, groups, transposed};
  p.bias = floats_of(args.bias, p.out.acc.c, args.acc, "bias");
  TORCH_CHECK_VALUE(args.residual.has_value() || !args.residual_mask.has_value(),
                    "deltafx: residual_mask goes with a residual");
  if (args.residual.has_value()) p.residual = map_like(*args.residual, args.acc, "residual");
  if (args.residual_mask.has_value()) {
    check_same_device(*args.residual_mask, args.acc, "residual_mask");
    p.residual_mask = mask_of(*args.residual_mask, p.residual, "residual_mask");
  }
  p.residual_after_act = args.residual_after_act;
  p.act = activation_of(args.act, args.act_params, args.act_weight, p.out.acc.c);
  return p;
}

int64_t conv_size(int64_t in, const Window& w) {
  return (in + 2 * w.pad - w.dilation * (w.kernel - 1) - 1) / w.stride + 1;
}

void check_conv_size(const ConvParams& p) {
  const int64_t h = conv_size(p.x.h, p.geometry.y), w = conv_size(p.x.w, p.geometry.x);
  TORCH_CHECK_VALUE(p.out.acc.h == h && p.out.acc.w == w, "deltafx: the accumulator is ",
                    p.out.acc.h, " x ", p.out.acc.w, " but this convolution of x gives ", h, " x ",
                    w);
}

#ifdef DELTAFX_CUDA
namespace {

void run_conv_on_cuda(const ConvParams& p, const Tensor& weight, const Tensor& acc,
                      const ConvRunning& running) {
  check_same_device(weight, acc, "weight");
  TORCH_CHECK_TYPE(weight.scalar_type() == acc.scalar_type(), "deltafx: weight is packed in ",
                   weight.scalar_type(), " but the accumulator is ", acc.scalar_type());
  const int64_t size = cuda::packed_size(p.geometry, p.out.acc.dtype);
  TORCH_CHECK_VALUE(weight.numel() == size && weight.is_contiguous(),
                    "deltafx: weight must be packed, of ", size, " elements, not ", weight.sizes());
  const bool allow_tf32 = at::globalContext().allowTF32CuDNN();
  run_on_cuda(acc, running.memory, cuda::conv_ints(p.out.acc.sites(), p.out.acc.n),
              [&](int32_t* memory, cudaStream_t stream) {
                return cuda::conv({p, weight.const_data_ptr(), allow_tf32, running.plain, memory,
                                   running.listed, running.filtered},
                                  stream);
              });
}

}  // namespace
#endif

void run_conv(ConvParams& p, const Tensor& weight, const Tensor& acc,
              [[maybe_unused]] const ConvRunning& running) {
  TORCH_CHECK_VALUE(!running.listed || running.memory.has_value(),
                    "deltafx: a convolution whose candidates are listed needs the list as memory");
#ifdef DELTAFX_CUDA
  if (acc.is_cuda()) return run_conv_on_cuda(p, weight, acc, running);
#endif
  p.weight = floats_of(weight, conv_weight_size(product_geometry(p)), acc, "weight");
  conv(p);
}

}  // namespace deltafx
