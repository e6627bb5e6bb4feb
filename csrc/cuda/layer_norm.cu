// layer_norm: normalizes the channels of a site.
#include "cuda/ops.h"
#include "cuda/sites.cuh"

namespace deltafx::cuda {
namespace {

struct LayerNorm {
  FeatureMap x;
  bool aligned;
  const float* weight;
  const float* bias;
  float eps;

  // Every thread of a site reads all of its channels: the row is in the L1 cache, and a site with
  // more threads than a warp's has no other way to agree on the sums. In two passes, since the
  // difference of moments would cancel; the second also takes off how much the mean was rounded.
  __device__ void operator()(const Position&, int site, int c0, int count,
                             float (&y)[kVector]) const {
    const int channels = static_cast<int>(x.c);
    const float inv_c = 1.f / static_cast<float>(channels);
    const int64_t first = site * x.ld;
    float lanes[kVector] = {}, squares[kVector] = {}, v[kVector];
    for (int c = 0; c < channels; c += kVector) {
      load_any(x.data, x.dtype, first + c, channels - c, aligned, v);
#pragma unroll
      for (int i = 0; i < kVector; ++i) lanes[i] += v[i];
    }
    const float mean = sum(lanes) * inv_c;
#pragma unroll
    for (int i = 0; i < kVector; ++i) lanes[i] = 0.f;
    for (int c = 0; c < channels; c += kVector) {
      load_any(x.data, x.dtype, first + c, channels - c, aligned, v);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float d = c + i < channels ? v[i] - mean : 0.f;
        lanes[i] += d;
        squares[i] += d * d;
      }
    }
    const float shift = sum(lanes) * inv_c;
    const float rstd = 1.f / sqrtf(sum(squares) * inv_c - shift * shift + eps);
    load_any(x.data, x.dtype, first + c0, count, aligned, y);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i >= count) break;
      y[i] = (y[i] - mean - shift) * rstd;
      if (weight != nullptr) y[i] *= weight[c0 + i];
      if (bias != nullptr) y[i] += bias[c0 + i];
    }
  }

  static __device__ float sum(const float (&v)[kVector]) {
    return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
  }
};

}  // namespace

cudaError_t layer_norm(const LayerNormParams& p, int32_t* memory, cudaStream_t stream) {
  const LayerNorm f{p.x.map, is_aligned(p.x.map), p.weight, p.bias, p.eps};
  return update_sites(p.out, p.act, SiteQuery{p.x.mask}, f, memory, stream);
}

}  // namespace deltafx::cuda
