// resize2d: nearest, nearest-exact or bilinear.
#include "cuda/ops.h"
#include "cuda/sites.cuh"

namespace deltafx::cuda {
namespace {

struct Sample {
  int first, last;
  float lambda;
};

__device__ Sample sample_of(const ResizeRule& r, int o) {
  const float at = static_cast<float>(o);
  if (r.sampling == Sampling::nearest || r.sampling == Sampling::nearest_exact) {
    const bool exact = r.sampling == Sampling::nearest_exact;
    int i = static_cast<int>(floorf(__fmul_rn(__fadd_rn(at, exact ? 0.5f : 0.f), r.step)));
    if (!exact && r.out == r.in) i = o;
    if (!exact && r.out == 2 * r.in) i = o / 2;
    i = min(i, r.in - 1);
    return {i, i, 0.f};
  }
  float x = r.sampling == Sampling::linear_corners
                ? __fmul_rn(r.step, at)
                : fmaxf(__fmaf_rn(r.step, at + 0.5f, -0.5f), 0.f);
  if (r.out == r.in) x = at;
  const int i = min(static_cast<int>(floorf(x)), r.in - 1);
  const float lambda = fminf(fmaxf(__fsub_rn(x, static_cast<float>(i)), 0.f), 1.f);
  return {i, r.out == r.in ? i : min(i + 1, r.in - 1), lambda};
}

struct Resize {
  FeatureMap x;
  Mask mask;
  ResizeRule y_rule, x_rule;
  bool aligned;

  __device__ bool operator()(const Position& at) const {
    const Sample sy = sample_of(y_rule, at.y), sx = sample_of(x_rule, at.x);
    const uint8_t* stream = mask.data + at.n * mask.h * mask.w;
    const uint8_t *top = stream + sy.first * mask.w, *bottom = stream + sy.last * mask.w;
    return (top[sx.first] | top[sx.last] | bottom[sx.first] | bottom[sx.last]) != 0;
  }

  __device__ void load(const Position& at, int iy, int ix, int c0, int count,
                       float (&v)[kVector]) const {
    load_any(x.data, x.dtype, ((at.n * x.h + iy) * x.w + ix) * x.ld + c0, count, aligned, v);
  }

  __device__ void operator()(const Position& at, int, int c0, int count,
                             float (&y)[kVector]) const {
    const Sample sy = sample_of(y_rule, at.y), sx = sample_of(x_rule, at.x);
    load(at, sy.first, sx.first, c0, count, y);
    if (y_rule.sampling == Sampling::nearest || y_rule.sampling == Sampling::nearest_exact) return;
    float right[kVector], left[kVector], other[kVector];
    load(at, sy.first, sx.last, c0, count, right);
    load(at, sy.last, sx.first, c0, count, left);
    load(at, sy.last, sx.last, c0, count, other);
    const float my = 1.f - sy.lambda, mx = 1.f - sx.lambda;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float top = y[i] * mx + right[i] * sx.lambda;
      const float bottom = left[i] * mx + other[i] * sx.lambda;
      y[i] = top * my + bottom * sy.lambda;
    }
  }
};

}  // namespace

cudaError_t resize2d(const ResizeParams& p, const ResizeRule& y, const ResizeRule& x,
                     int32_t* memory, cudaStream_t stream) {
  const Resize f{p.x.map, p.x.mask, y, x, is_aligned(p.x.map)};
  return update_sites(p.out, p.act, f, f, memory, stream);
}

}  // namespace deltafx::cuda
