// deltafx::depthwise_everywhere: a 3x3 depthwise convolution at every site with its bias and
// activation, for a frame that changed everywhere. CUDA and half precision only.
#ifdef DELTAFX_CUDA
#include "cuda/depthwise_everywhere.h"
#endif
#include "ops/dispatch.h"
#include "ops/schema.h"

namespace deltafx {

#ifdef DELTAFX_CUDA
namespace {

void depthwise_everywhere(const Tensor& acc, const Tensor& x, const Tensor& weight,
                          const OptionalTensor& bias, at::IntArrayRef stride,
                          at::IntArrayRef padding, c10::string_view act,
                          c10::ArrayRef<double> act_params, const OptionalTensor& act_weight) {
  cuda::DepthwiseParams p{};
  p.acc = feature_map(acc, "acc");
  p.x = feature_map(x, "x");
  check_same_device(x, acc, "x");
  check_same_device(weight, acc, "weight");
  TORCH_CHECK_TYPE(p.acc.dtype != DType::f32 && p.x.dtype == p.acc.dtype &&
                       weight.scalar_type() == acc.scalar_type(),
                   "deltafx: acc, x and weight must be of one type of half precision, not ",
                   acc.scalar_type(), ", ", x.scalar_type(), " and ", weight.scalar_type());
  TORCH_CHECK_VALUE(p.x.c == p.acc.c && weight.numel() == 9 * p.acc.c && weight.is_contiguous(),
                    "deltafx: a 3x3 depthwise convolution of ", p.x.c,
                    " channels has as many out, not ", p.acc.c, ", and 9 weights each, not ",
                    weight.numel(), " in all");
  TORCH_CHECK_VALUE(in_vectors(p.acc) && in_vectors(p.x) &&
                        reinterpret_cast<uintptr_t>(weight.data_ptr()) % 16 == 0,
                    "deltafx: channels must lie in whole vectors of eight");
  TORCH_CHECK_VALUE(stride[0] == stride[1] && (stride[0] == 1 || stride[0] == 2),
                    "deltafx: stride must be (1, 1) or (2, 2), not ", stride);
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t in = axis == 0 ? p.x.h : p.x.w, out = axis == 0 ? p.acc.h : p.acc.w;
    TORCH_CHECK_VALUE(padding[axis] >= 0 && out == (in + 2 * padding[axis] - 3) / stride[axis] + 1,
                      "deltafx: acc is ", acc.sizes(), " but x is ", x.sizes());
  }
  TORCH_CHECK_VALUE(p.x.n == p.acc.n, "deltafx: acc is ", acc.sizes(), " but x is ", x.sizes());
  p.weight = weight.const_data_ptr();
  p.bias = floats_of(bias, p.acc.c, acc, "bias");
  p.act = activation_of(act, act_params, act_weight, p.acc.c);
  p.pad_y = static_cast<int>(padding[0]);
  p.pad_x = static_cast<int>(padding[1]);
  p.stride = static_cast<int>(stride[0]);
  run_on_cuda(acc, [&](cudaStream_t stream) { return cuda::depthwise_everywhere(p, stream); });
}

}  // namespace
#endif

TORCH_LIBRARY_FRAGMENT(deltafx, m) {
  m.def(
      "depthwise_everywhere(Tensor(a!) acc, Tensor x, Tensor weight, Tensor? bias, int[2] stride, "
      "int[2] padding, str act, float[] act_params, Tensor? act_weight) -> ()",
      {at::Tag::pt2_compliant_tag});
}
#ifdef DELTAFX_CUDA
TORCH_LIBRARY_IMPL(deltafx, CUDA, m) { m.impl("depthwise_everywhere", depthwise_everywhere); }
#endif

}  // namespace deltafx
