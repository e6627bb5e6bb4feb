// pad2d: constant padding and cropping.
#include "cuda/ops.h"
#include "cuda/sites.cuh"

namespace deltafx::cuda {
namespace {

struct Pad {
  FeatureMap acc, x;
  Mask mask;
  int top, left;
  bool aligned;
  float value;

  __device__ int64_t source(const Position& at) const {
    const int y = at.y - top, x_ = at.x - left;
    const bool inside = y >= 0 && y < x.h && x_ >= 0 && x_ < x.w;
    return inside ? (at.n * x.h + y) * x.w + x_ : -1;
  }
  __device__ void operator()(const Position& at, int, int c0, int count,
                             float (&y)[kVector]) const {
    const int64_t from = source(at);
    if (from >= 0) return load_any(x.data, x.dtype, from * x.ld + c0, count, aligned, y);
#pragma unroll
    for (int i = 0; i < kVector; ++i) y[i] = value;
  }
  bool reads_result() const { return true; }
  // The border is a candidate only where it is lost.
  __device__ bool operator()(const Position& at) const {
    const int64_t from = source(at);
    return from >= 0 ? mask.data[from] != 0 : is_lost(acc, at);
  }
};

}  // namespace

cudaError_t pad2d(const PadParams& p, int32_t* memory, cudaStream_t stream) {
  const Pad f{
      p.out.acc,           p.x.map, p.x.mask, static_cast<int>(p.top), static_cast<int>(p.left),
      is_aligned(p.x.map), p.value};
  return update_sites(p.out, {Act::identity, {}, nullptr}, f, f, memory, stream);
}

}  // namespace deltafx::cuda
