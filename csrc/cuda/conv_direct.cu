#include "cuda/conv_direct.h"

#include "cuda/sites.cuh"

namespace deltafx::cuda {
namespace {

// Eight output channels of a site, before the activation: the sums, the bias, and a residual that
// is added before the activation.
template <class T>
struct Direct {
  GemmParams p;
  int group_in, group_out;
  bool x_aligned, weight_aligned;

  __device__ void operator()(const Position& at, int site, int c0, int count,
                             float (&y)[kVector]) const {
    if (p.bias != nullptr) load_vector(p.bias + c0, count, false, y);
    const int base_y = p.y.base(at.y), base_x = p.x_axis.base(at.x);
    const int taps_x = p.x_axis.phase.taps, cout = static_cast<int>(p.out.acc.c);
    const T* weight = static_cast<const T*>(p.weight) + c0;
    const bool depthwise = group_in == 1 && group_out == 1 && p.pre_scale == nullptr;
    for (int jy = 0; jy < p.y.phase.taps; ++jy) {
      const int iy = base_y + jy * p.y.phase.step;
      if (iy < 0 || iy >= p.x.h) continue;
      const T* row =
          static_cast<const T*>(p.x.data) + ((at.n * p.x.h + iy) * p.x.w + base_x) * p.x.ld;
      const T* w = weight + static_cast<int64_t>(jy * taps_x) * group_in * cout;
      if (depthwise && x_aligned && weight_aligned) {
        for (int jx = 0; jx < taps_x; jx += kTapsAtOnce)
          add_taps(row + c0, w, base_x, jx, min(kTapsAtOnce, taps_x - jx), cout, y);
        continue;
      }
      for (int jx = 0; jx < taps_x; ++jx) {
        const int ix = base_x + jx * p.x_axis.phase.step;
        if (ix < 0 || ix >= p.x.w) continue;
        add_tap(row + jx * p.x_axis.phase.step * p.x.ld,
                w + static_cast<int64_t>(jx) * group_in * cout, c0, count, cout, y);
      }
    }
    if (p.residual.data == nullptr) return;
    float residual[kVector];
    load_vector(static_cast<const T*>(p.residual.data) + site * p.residual.ld + c0, count,
                p.residual_aligned, residual);
    if (p.residual_after_act) activate(p.act, c0, count, y);
#pragma unroll
    for (int i = 0; i < kVector; ++i) y[i] += residual[i];
  }

  // Neighbouring taps of a depthwise convolution, all of them read before the first is used.
  static constexpr int kTapsAtOnce = 3;
  __device__ void add_taps(const T* row, const T* w, int base_x, int jx, int taps, int cout,
                           float (&y)[kVector]) const {
    Packet<T> v[kTapsAtOnce], k[kTapsAtOnce];
    bool inside[kTapsAtOnce];
#pragma unroll
    for (int j = 0; j < kTapsAtOnce; ++j) {
      const int offset = (jx + j) * p.x_axis.phase.step, ix = base_x + offset;
      inside[j] = j < taps && ix >= 0 && ix < p.x.w;
      if (!inside[j]) continue;
      v[j].load(row + offset * p.x.ld);
      k[j].load(w + static_cast<int64_t>(jx + j) * cout);
    }
#pragma unroll
    for (int j = 0; j < kTapsAtOnce; ++j) {
      if (!inside[j]) continue;
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        y[i] = fmaf(to_float(v[j].elements[i]), to_float(k[j].elements[i]), y[i]);
    }
  }

  // One tap of any grouping, with the prologue.
  __device__ void add_tap(const T* x, const T* w, int c0, int count, int cout,
                          float (&y)[kVector]) const {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i >= count) break;
      const int first = (c0 + i) / group_out * group_in;
      float sum = 0.f;  // of the tap by itself, as one long chain of sums would round more
      for (int k = 0; k < group_in; ++k)
        sum = fmaf(input(x, first + k), to_float(w[static_cast<int64_t>(k) * cout + i]), sum);
      y[i] += sum;
    }
  }
  __device__ float input(const T* x, int c) const {
    float v[kVector] = {};
    v[0] = to_float(x[c]);
    if (p.pre_scale == nullptr) return v[0];
    v[0] = v[0] * p.pre_scale[c] + p.pre_shift[c];
    activate(p.pre_act, c, 1, v);
    return v[0];
  }
};

template <class T>
cudaError_t launch_as(const GemmParams& p, int group_in, int group_out, cudaStream_t stream) {
  const bool weight_aligned = is_aligned(p.weight, p.out.acc.dtype, p.out.acc.c, p.out.acc.c);
  const Direct<T> f{p, group_in, group_out, is_aligned(p.x), weight_aligned};
  const bool done = p.residual.data != nullptr && p.residual_after_act;
  const Activation act = done ? Activation{Act::identity, {}, nullptr} : p.act;
  return update_listed<T>(p.out, act, p.list, f, stream);
}

}  // namespace

cudaError_t conv_direct(const GemmParams& p, int group_in, int group_out, cudaStream_t stream) {
  return with_type(p.out.acc.dtype, [&](auto type) {
    return launch_as<typename decltype(type)::T>(p, group_in, group_out, stream);
  });
}

}  // namespace deltafx::cuda
