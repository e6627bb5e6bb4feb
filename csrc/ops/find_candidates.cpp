// deltafx::find_candidates: in one launch the candidates of a convolution and of others behind it,
// which conv2d then takes from there (`listed`). deltafx::conv2d_bears_list: for whom that is
// worthwhile. CUDA only.
#ifdef DELTAFX_CUDA
#include "cuda/conv.h"
#endif
#include "ops/conv_args.h"
#include "ops/dispatch.h"

namespace deltafx {

#ifdef DELTAFX_CUDA
namespace {

Mask mask_alone(const Tensor& t, const Tensor& memory, const char* name) {
  check_same_device(t, memory, name);
  TORCH_CHECK_VALUE(t.dim() == 3, "deltafx: ", name, " must be [N, H, W], not of ", t.dim(),
                    " dimensions");
  FeatureMap like{};
  like.n = t.size(0), like.h = t.size(1), like.w = t.size(2);
  return mask_of(t, like, name);
}

void find_candidates(const Tensor& memory, const Tensor& counts, const Tensor& x_mask,
                     const OptionalTensor& residual_mask, at::IntArrayRef kernel,
                     at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                     const OptionalTensor& memory_1, const OptionalTensor& counts_1,
                     const OptionalTensor& mask_1, int64_t stride_1, const OptionalTensor& memory_2,
                     const OptionalTensor& counts_2, const OptionalTensor& mask_2,
                     int64_t stride_2) {
  cuda::ConvListLaunch launch{};
  launch.geometry = {window_of(kernel, stride, padding, dilation, 0),
                     window_of(kernel, stride, padding, dilation, 1),
                     1,
                     1,
                     1,
                     false};
  launch.x_mask = mask_alone(x_mask, memory, "x_mask");
  launch.h = conv_size(launch.x_mask.h, launch.geometry.y);
  launch.w = conv_size(launch.x_mask.w, launch.geometry.x);
  TORCH_CHECK_VALUE(launch.h > 0 && launch.w > 0, "deltafx: this convolution of a map of ",
                    launch.x_mask.h, " x ", launch.x_mask.w, " has no result");
  const int64_t n = launch.x_mask.n, ints = cuda::conv_ints(n * launch.h * launch.w, n);
  if (residual_mask.has_value()) {
    launch.residual_mask = mask_alone(*residual_mask, memory, "residual_mask");
    TORCH_CHECK_VALUE(launch.residual_mask.n == n && launch.residual_mask.h == launch.h &&
                          launch.residual_mask.w == launch.w,
                      "deltafx: residual_mask is ", residual_mask->sizes(), " but the result [", n,
                      ", ", launch.h, ", ", launch.w, "]");
  }
  launch.memory = ints_of(memory, ints, memory, "memory");
  launch.counts = counts_of(counts, memory, "counts");
  const auto add = [&](const Tensor& list, const Tensor& its_counts, const OptionalTensor& mask,
                       int64_t its_stride) {
    cuda::FurtherCandidates& other = launch.others[launch.further++];
    other = {{},
             static_cast<int>(its_stride),
             ints_of(list, ints, memory, "the memory of a further list"),
             counts_of(its_counts, memory, "the counts of a further list")};
    TORCH_CHECK_VALUE(its_stride == 1 || its_stride == 2,
                      "deltafx: the stride of a further list is 1 or 2, not ", its_stride);
    TORCH_CHECK_VALUE(!mask.has_value() || other.memory != launch.memory,
                      "deltafx: a further list in the memory of the first has no mask");
    if (!mask.has_value()) return;
    other.mask = mask_alone(*mask, memory, "the mask of a further list");
    const auto fits = [&](int64_t in, int64_t out) { return (in - 1) / its_stride + 1 == out; };
    TORCH_CHECK_VALUE(
        other.mask.n == n && fits(other.mask.h, launch.h) && fits(other.mask.w, launch.w),
        "deltafx: the mask of a further list is ", mask->sizes(), " but the result [", n, ", ",
        launch.h, ", ", launch.w, "] and its stride ", its_stride);
  };
  TORCH_CHECK_VALUE(
      memory_1.has_value() == counts_1.has_value() && memory_2.has_value() == counts_2.has_value(),
      "deltafx: the memory and the counts of a further list go together");
  if (memory_1.has_value()) add(*memory_1, *counts_1, mask_1, stride_1);
  if (memory_2.has_value()) add(*memory_2, *counts_2, mask_2, stride_2);
  run_on_cuda(memory, [&](cudaStream_t stream) { return cuda::list_conv(launch, stream); });
}

// On meta tensors, which lie where those of a state will: as far from a vector's beginning.
bool conv2d_bears_list(const Tensor& acc, const Tensor& x, const OptionalTensor& residual,
                       at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                       at::IntArrayRef dilation, int64_t groups, double wider, bool ahead,
                       c10::Device device) {
  ConvParams p{};
  p.out.acc = feature_map(acc, "acc");
  p.x = feature_map(x, "x");
  if (residual.has_value()) p.residual = feature_map(*residual, "residual");
  p.geometry = {window_of(kernel, stride, padding, dilation, 0),
                window_of(kernel, stride, padding, dilation, 1),
                p.x.c,
                p.out.acc.c,
                groups,
                false};
  check_conv_size(p);
  c10::cuda::OptionalCUDAGuard guard;
  if (device.has_index()) guard.set_device(device);
  return cuda::conv_bears_list(p, wider, ahead);
}

}  // namespace
#endif

// memory_1, counts_1: the list and the counts of another conv2d over the same sites, whose
// candidates are those of the first, and where mask_1 is set, in steps of stride_1; and so for 2.
TORCH_LIBRARY_FRAGMENT(deltafx, m) {
  m.def(
      "find_candidates(Tensor(a!) memory, Tensor(b!) counts, Tensor x_mask, "
      "Tensor? residual_mask, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, "
      "Tensor(c!)? memory_1=None, Tensor(d!)? counts_1=None, Tensor? mask_1=None, "
      "int stride_1=1, "
      "Tensor(e!)? memory_2=None, Tensor(f!)? counts_2=None, Tensor? mask_2=None, "
      "int stride_2=1) -> ()",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "conv2d_bears_list(Tensor acc, Tensor x, Tensor? residual, int[2] kernel, int[2] stride, "
      "int[2] padding, int[2] dilation, int groups, float wider, bool ahead, Device device) -> "
      "bool",
      {at::Tag::pt2_compliant_tag});
}
#ifdef DELTAFX_CUDA
TORCH_LIBRARY_IMPL(deltafx, CUDA, m) { m.impl("find_candidates", find_candidates); }
TORCH_LIBRARY_IMPL(deltafx, Meta, m) { m.impl("conv2d_bears_list", conv2d_bears_list); }
#endif

}  // namespace deltafx
