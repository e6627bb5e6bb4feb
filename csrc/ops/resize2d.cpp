// deltafx::resize2d: nearest, nearest-exact or bilinear resampling to the accumulator's size, at
// the coordinates of torch's upsample_* on the CPU, which it computes in fp32.
#include <algorithm>
#include <cmath>

#include "cpu/parallel.h"
#include "ops/dispatch.h"
#include "ops/schema.h"

namespace deltafx {
namespace {

// Input coordinates per output coordinate: a given scale wins over the sizes' quotient.
float step_of(int64_t in, int64_t out, std::optional<double> scale) {
  if (scale.has_value() && *scale > 0.) return static_cast<float>(1. / *scale);
  return static_cast<float>(in) / static_cast<float>(out);
}

void nearest(int64_t in, int64_t out, bool exact, std::optional<double> scale, int32_t* first) {
  const float step = step_of(in, out, scale), offset = exact ? 0.5f : 0.f;
  for (int64_t o = 0; o < out; ++o) {
    int64_t i = static_cast<int64_t>(std::floor((static_cast<float>(o) + offset) * step));
    // The plain mode takes these two sizes exactly, whatever scale was given.
    if (!exact && out == in) i = o;
    if (!exact && out == 2 * in) i = o / 2;
    first[o] = static_cast<int32_t>(std::min(i, in - 1));
  }
}

float linear_step(int64_t in, int64_t out, bool align_corners, std::optional<double> scale) {
  if (!align_corners) return step_of(in, out, scale);
  return out > 1 ? static_cast<float>(in - 1) / static_cast<float>(out - 1) : 0.f;
}

void linear(int64_t in, int64_t out, bool align_corners, std::optional<double> scale,
            int32_t* first, int32_t* last, float* lambda) {
  const float step = linear_step(in, out, align_corners, scale);
  for (int64_t o = 0; o < out; ++o) {
    const float at = static_cast<float>(o);
    // Fused, as ATen's vectorized build contracts it: an ulp here is 1e-6 in the weights.
    float x = align_corners ? step * at : std::max(std::fma(step, at + 0.5f, -0.5f), 0.f);
    if (out == in) x = at;
    const int64_t i = std::min(static_cast<int64_t>(std::floor(x)), in - 1);
    first[o] = static_cast<int32_t>(i);
    last[o] = static_cast<int32_t>(out == in ? i : std::min(i + 1, in - 1));
    lambda[o] = std::min(std::max(x - static_cast<float>(i), 0.f), 1.f);
  }
}

void resize2d(const Tensor& acc, const Tensor& mask, const Tensor& counts, const Tensor& x,
              const Tensor& x_mask, c10::string_view kind, bool align_corners,
              std::optional<double> scale_h, std::optional<double> scale_w, c10::string_view act,
              c10::ArrayRef<double> act_params, const OptionalTensor& act_weight,
              const OptionalTensor& inv_scale, const OptionalTensor& threshold,
              c10::string_view policy, const OptionalTensor& memory) {
  ResizeParams p{};
  p.out = output_of(acc, mask, counts, inv_scale, threshold, policy);
  check_dtype_on(acc, p.out.acc.dtype);
  p.act = activation_of(act, act_params, act_weight, p.out.acc.c);
  p.x = input_like(x, x_mask, acc, false);
  p.linear = kind == "bilinear";
  TORCH_CHECK_VALUE(p.linear || kind == "nearest" || kind == "nearest-exact",
                    "deltafx: kind must be 'nearest', 'nearest-exact' or 'bilinear', not '", kind,
                    "'");
  TORCH_CHECK_VALUE(p.linear || !align_corners, "deltafx: align_corners goes with 'bilinear'");
  const int64_t h = p.out.acc.h, w = p.out.acc.w;
#ifdef DELTAFX_CUDA
  if (acc.is_cuda()) {
    const cuda::Sampling sampling =
        p.linear ? align_corners ? cuda::Sampling::linear_corners : cuda::Sampling::linear
        : kind == "nearest" ? cuda::Sampling::nearest
                            : cuda::Sampling::nearest_exact;
    const auto rule = [&](int64_t in, int64_t out, std::optional<double> scale) {
      const float step =
          p.linear ? linear_step(in, out, align_corners, scale) : step_of(in, out, scale);
      return cuda::ResizeRule{static_cast<int>(in), static_cast<int>(out), sampling, step};
    };
    return run_on_cuda(acc, memory, cuda::list_ints(p.out.acc.sites()),
                       [&](int32_t* list, cudaStream_t stream) {
                         return cuda::resize2d(p, rule(p.x.map.h, h, scale_h),
                                               rule(p.x.map.w, w, scale_w), list, stream);
                       });
  }
#endif
  int32_t* table = scratch_of<int32_t>(Scratch::tile, 3 * (h + w));
  int32_t *y0 = table, *y1 = y0 + h, *x0 = y1 + h, *x1 = x0 + w;
  float *ly = reinterpret_cast<float*>(x1 + w), *lx = ly + h;
  if (p.linear) {
    linear(p.x.map.h, h, align_corners, scale_h, y0, y1, ly);
    linear(p.x.map.w, w, align_corners, scale_w, x0, x1, lx);
  } else {
    nearest(p.x.map.h, h, kind == "nearest-exact", scale_h, y0);
    nearest(p.x.map.w, w, kind == "nearest-exact", scale_w, x0);
    std::copy_n(y0, h, y1);
    std::copy_n(x0, w, x1);
  }
  p.y = {y0, y1, ly};
  p.x_axis = {x0, x1, lx};
  kernels().resize2d(p);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(deltafx, m) {
  m.def("resize2d(" DELTAFX_HEAD
        "Tensor x, Tensor x_mask, str kind, bool align_corners, float? scale_h, "
        "float? scale_w, " DELTAFX_TAIL,
        {at::Tag::pt2_compliant_tag});
}
DELTAFX_IMPL(m.impl("resize2d", resize2d))

}  // namespace deltafx
