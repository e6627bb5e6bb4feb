// affine: y = x * scale[c] + shift[c].
#include "cuda/ops.h"
#include "cuda/sites.cuh"

namespace deltafx::cuda {
namespace {

struct Affine {
  FeatureMap x;
  bool aligned;
  const float* scale;
  const float* shift;

  __device__ void operator()(const Position&, int site, int c0, int count,
                             float (&y)[kVector]) const {
    load_any(x.data, x.dtype, site * x.ld + c0, count, aligned, y);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i >= count) break;
      // Two roundings, as the dense model has: a fused one would be another function.
      if (scale != nullptr) y[i] = __fmul_rn(y[i], scale[c0 + i]);
      if (shift != nullptr) y[i] = __fadd_rn(y[i], shift[c0 + i]);
    }
  }
};

}  // namespace

cudaError_t affine(const AffineParams& p, int32_t* memory, cudaStream_t stream) {
  const Affine f{p.x.map, is_aligned(p.x.map), p.scale, p.shift};
  return update_sites(p.out, p.act, SiteQuery{p.x.mask}, f, memory, stream);
}

}  // namespace deltafx::cuda
