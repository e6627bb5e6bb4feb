// deltafx::gemm_everywhere: a pointwise convolution, or one of an image filled up to four channels,
// at every site with its bias, residual and activation, for a frame that changed everywhere: what
// cuDNN does not fuse. CUDA and half precision only.
#ifdef DELTAFX_CUDA
#include "cuda/gemm_everywhere.h"
#endif
#include "ops/dispatch.h"
#include "ops/schema.h"

namespace deltafx {

#ifdef DELTAFX_CUDA
namespace {

void check_in_vectors(const FeatureMap& map, const char* name) {
  TORCH_CHECK_VALUE(in_vectors(map), "deltafx: the channels of ", name,
                    " must lie in whole vectors of eight");
}

void gemm_everywhere(const Tensor& acc, const Tensor& x, const Tensor& weight,
                     const OptionalTensor& bias, const OptionalTensor& residual,
                     at::IntArrayRef stride, at::IntArrayRef padding, bool residual_after_act,
                     c10::string_view act, c10::ArrayRef<double> act_params,
                     const OptionalTensor& act_weight) {
  cuda::GemmEverywhereParams p{};
  p.acc = feature_map(acc, "acc");
  p.x = feature_map(x, "x");
  check_in_vectors(p.acc, "acc");
  check_same_device(x, acc, "x");
  check_same_device(weight, acc, "weight");
  TORCH_CHECK_TYPE(p.acc.dtype != DType::f32 && x.scalar_type() == acc.scalar_type() &&
                       weight.scalar_type() == acc.scalar_type(),
                   "deltafx: acc, x and weight must be of one type of half precision, not ",
                   acc.scalar_type(), ", ", x.scalar_type(), " and ", weight.scalar_type());
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(0) == p.acc.c && weight.size(1) == p.x.c &&
                        weight.is_contiguous(at::MemoryFormat::ChannelsLast) &&
                        reinterpret_cast<uintptr_t>(weight.const_data_ptr()) % 16 == 0,
                    "deltafx: weight must be [", p.acc.c, ", ", p.x.c,
                    ", kh, kw], channels_last, not ", weight.sizes());
  const int64_t taps[] = {weight.size(2), weight.size(3)};
  p.is_pointwise =
      taps[0] * taps[1] == 1 && stride[0] * stride[1] == 1 && padding[0] == 0 && padding[1] == 0;
  if (p.is_pointwise)
    check_in_vectors(p.x, "x");
  else
    TORCH_CHECK_VALUE(p.x.c == cuda::kImageChannels && p.x.ld == cuda::kImageChannels &&
                          reinterpret_cast<uintptr_t>(p.x.data) % 8 == 0,
                      "deltafx: x must have 4 channels and no others beside them, not ", x.sizes());
  bool fits = p.x.n == p.acc.n;
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t in = axis == 0 ? p.x.h : p.x.w, out = axis == 0 ? p.acc.h : p.acc.w;
    fits &= padding[axis] >= 0 && stride[axis] >= 1 &&
            out == (in + 2 * padding[axis] - taps[axis]) / stride[axis] + 1;
  }
  TORCH_CHECK_VALUE(fits, "deltafx: acc is ", acc.sizes(), " but x is ", x.sizes());
  if (residual.has_value()) {
    p.residual = map_like(*residual, acc, "residual");
    check_in_vectors(p.residual, "residual");
  }
  p.weight = weight.const_data_ptr();
  p.bias = floats_of(bias, p.acc.c, acc, "bias");
  p.residual_after_act = residual_after_act;
  p.act = activation_of(act, act_params, act_weight, p.acc.c);
  p.taps_y = static_cast<int>(taps[0]);
  p.taps_x = static_cast<int>(taps[1]);
  p.stride_y = static_cast<int>(stride[0]);
  p.stride_x = static_cast<int>(stride[1]);
  p.pad_y = static_cast<int>(padding[0]);
  p.pad_x = static_cast<int>(padding[1]);
  run_on_cuda(acc, [&](cudaStream_t stream) { return cuda::gemm_everywhere(p, stream); });
}

}  // namespace
#endif

TORCH_LIBRARY_FRAGMENT(deltafx, m) {
  m.def(
      "gemm_everywhere(Tensor(a!) acc, Tensor x, Tensor weight, Tensor? bias, Tensor? residual, "
      "int[2] stride, int[2] padding, bool residual_after_act, str act, float[] act_params, "
      "Tensor? act_weight) -> ()",
      {at::Tag::pt2_compliant_tag});
}
#ifdef DELTAFX_CUDA
TORCH_LIBRARY_IMPL(deltafx, CUDA, m) { m.impl("gemm_everywhere", gemm_everywhere); }
#endif

}  // namespace deltafx
