// gather_channels: y[c] = x[index[c]], or x as it is.
#include "cuda/ops.h"
#include "cuda/sites.cuh"

namespace deltafx::cuda {
namespace {

struct Copy {
  FeatureMap x;
  bool aligned;

  __device__ void operator()(const Position&, int site, int c0, int count,
                             float (&y)[kVector]) const {
    load_any(x.data, x.dtype, site * x.ld + c0, count, aligned, y);
  }
};

// The index travels with the launch, so that a captured graph owns it.
constexpr int kMostChannels = 8192;
template <int kChannels>
struct Gather {
  FeatureMap x;
  uint16_t index[kChannels];

  __device__ void operator()(const Position&, int site, int c0, int count,
                             float (&y)[kVector]) const {
    const int64_t first = site * x.ld;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i >= count) break;
      const int64_t at = first + index[c0 + i];
      y[i] = x.dtype == DType::f32    ? static_cast<const float*>(x.data)[at]
             : x.dtype == DType::bf16 ? to_float(static_cast<const __nv_bfloat16*>(x.data)[at])
                                      : to_float(static_cast<const __half*>(x.data)[at]);
    }
  }
};

template <int kChannels>
cudaError_t gather(const GatherParams& p, int32_t* memory, cudaStream_t stream) {
  Gather<kChannels> f{p.x.map, {}};
  for (int64_t c = 0; c < p.out.acc.c; ++c) f.index[c] = static_cast<uint16_t>(p.index[c]);
  return update_sites(p.out, p.act, SiteQuery{p.x.mask}, f, memory, stream);
}

}  // namespace

cudaError_t gather_channels(const GatherParams& p, int32_t* memory, cudaStream_t stream) {
  if (p.index == nullptr)
    return update_sites(p.out, p.act, SiteQuery{p.x.mask}, Copy{p.x.map, is_aligned(p.x.map)},
                        memory, stream);
  if (p.out.acc.c > kMostChannels || p.x.map.c > 65536) return cudaErrorInvalidValue;
  return p.out.acc.c <= 1024 ? gather<1024>(p, memory, stream)
                             : gather<kMostChannels>(p, memory, stream);
}

}  // namespace deltafx::cuda
