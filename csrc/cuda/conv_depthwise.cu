// Depthwise convolution in vectors of eight channels: bound by bytes and latency, so all taps of a
// row, and of a 3x3 window all nine, are asked for before the first is used.
#include "cuda/conv_depthwise.h"

#include "cuda/conv_query.cuh"
#include "cuda/own_list.cuh"
#include "cuda/update.cuh"

namespace deltafx::cuda {
namespace {

constexpr int kThreads = 256, kBlocksPerMultiprocessor = 2;

// A row of a window: kTaps vectors of the input. The weights are few and come from the cache.
template <class T, int kTaps>
struct TapRow {
  Packet<T> x[kTaps];

  __device__ void fetch(const GemmParams& p, const T* row, int left, bool inside) {
    const int step = p.x_axis.phase.step;
#pragma unroll
    for (int j = 0; j < kTaps; ++j) {
      const int ix = left + j * step;
      const bool reads = inside && ix >= 0 && ix < p.x.w;
#pragma unroll
      for (uint4& word : x[j].words) word = make_uint4(0, 0, 0, 0);
      if (reads) x[j].load(row + j * step * p.x.ld);
    }
  }
  __device__ void add_to(float (&y)[kVector], const T* weights, int channels) const {
#pragma unroll
    for (int j = 0; j < kTaps; ++j) {
      Packet<T> weight;
      weight.load(weights + j * channels);
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        y[i] = fmaf(to_float(x[j].elements[i]), to_float(weight.elements[i]), y[i]);
    }
  }
};

// kLanes threads have a truncation group of a site. kTaps: of a row.
template <class T, int kLanes, int kTaps>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    depthwise_kernel(const __grid_constant__ GemmParams p) {
  extern __shared__ __align__(16) char shared[];
  wait_for_inputs();
  int size, first_entry = 0;
  auto* own_list = reinterpret_cast<uint16_t*>(shared + kOwnMaskBytes);
  if (p.lists_itself) {
    const ConvQuery query{p.x_mask, p.residual_mask, p.y, p.x_axis, nullptr};
    size = list_own<kThreads>(query, p.runs, p.out, shared, own_list);
  } else {
    first_entry = p.list.first();
    size = p.list.last() - first_entry;
  }
  const FeatureMap& acc = p.out.acc;
  const FastActivation act(p.act);
  const int channels = static_cast<int>(acc.c), lane = static_cast<int>(threadIdx.x) % 32;
  const int groups =
      (channels + static_cast<int>(kTruncationGroup) - 1) / static_cast<int>(kTruncationGroup);
  const int work = size * groups;
  const int warp = static_cast<int>(blockIdx.x * kThreads + threadIdx.x) / 32;
  constexpr int kUnits = 32 / kLanes;  // of a warp
  SiteMarks marks;
  for (int first = warp * kUnits; first < work;
       first += static_cast<int>(gridDim.x) * kThreads / kLanes) {
    const int own = first + lane / kLanes;
    const bool valid = own < work;
    const int entry = valid ? own / groups : 0, group = own - own / groups * groups;
    const int site = !valid           ? 0
                     : p.lists_itself ? static_cast<int>(own_list[entry])
                                      : site_in(p.list.entries[first_entry + entry]);
    const int c0 = group * static_cast<int>(kTruncationGroup) + lane % kLanes * kVector;
    const int count = valid && c0 < channels ? kVector : 0;
    float y[kVector] = {}, old[kVector] = {};
    T* to = static_cast<T*>(acc.data) + site * acc.ld + c0;
    if (count > 0) {
      const Position at = position_of(site, p.h, p.w);
      const int top = p.y.base(at.y), left = p.x_axis.base(at.x);
      const T* weights = static_cast<const T*>(p.weight) + c0;
      const T* row =
          static_cast<const T*>(p.x.data) + ((at.n * p.x.h + top) * p.x.w + left) * p.x.ld + c0;
      const int64_t pitch = p.y.phase.step * p.x.w * p.x.ld;
      const auto inside = [&](int jy) {
        const int iy = top + jy * p.y.phase.step;
        return iy >= 0 && iy < p.x.h;
      };
      Packet<T> before;
      if (p.out.truncation.policy != Policy::none) before.load(to);
      if constexpr (kTaps == 3) {
        TapRow<T, kTaps> rows[3];
#pragma unroll
        for (int jy = 0; jy < 3; ++jy) rows[jy].fetch(p, row + jy * pitch, left, inside(jy));
        if (p.bias != nullptr) load_floats(p.bias + c0, kVector, y);
#pragma unroll
        for (int jy = 0; jy < 3; ++jy)
          rows[jy].add_to(y, weights + jy * kTaps * channels, channels);
      } else {
        if (p.bias != nullptr) load_floats(p.bias + c0, kVector, y);
#pragma unroll 1
        for (int jy = 0; jy < p.y.phase.taps; ++jy) {
          TapRow<T, kTaps> taps;
          taps.fetch(p, row + jy * pitch, left, inside(jy));
          taps.add_to(y, weights + jy * kTaps * channels, channels);
        }
      }
      act.apply(p.act, c0, kVector, y);
      if (p.out.truncation.policy != Policy::none) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) old[i] = to_float(before.elements[i]);
      }
    }
    const GroupRule rule(p.out, c0, count);
    round_to<T>(y, count);
    const bool changed = rule.template changed<kLanes>(y, old);
    if (!valid || !changed) continue;
    if (count > 0) store_vector(to, count, true, y);
    if (lane % kLanes == 0) marks.set(p, site, first_entry + entry);
  }
  const int found = sum_over_warp(marks.count());
  if (lane == 0 && found > 0) add_to(p.out.counts + 1, found);
}

template <class T, int kLanes, int kTaps>
cudaError_t launch_depthwise(const GemmParams& p, cudaStream_t stream) {
  const int64_t groups = (p.out.acc.c + kTruncationGroup - 1) / kTruncationGroup;
  const int64_t needed = (p.out.acc.sites() * groups * kLanes + kThreads - 1) / kThreads;
  const int64_t most = int64_t{kBlocksPerMultiprocessor} * current_device().multiprocessors;
  const int shared_bytes = p.lists_itself ? kOwnMaskBytes + kOwnListBytes : 0;
  const Grid grid{static_cast<int>(needed < most ? needed : most), kThreads, shared_bytes};
  return launch(depthwise_kernel<T, kLanes, kTaps>, grid, stream, p);
}

template <class T, int kTaps>
cudaError_t launch_taps(const GemmParams& p, cudaStream_t stream) {
  return p.out.acc.c <= 32 ? launch_depthwise<T, 4, kTaps>(p, stream)
                           : launch_depthwise<T, 8, kTaps>(p, stream);
}

template <class T>
cudaError_t launch_type(const GemmParams& p, cudaStream_t stream) {
  return p.x_axis.phase.taps == 3 ? launch_taps<T, 3>(p, stream) : launch_taps<T, 5>(p, stream);
}

}  // namespace

bool conv_depthwise_takes(const GemmParams& p) {
  const int taps = p.x_axis.phase.taps;
  return p.pre_scale == nullptr && p.residual.data == nullptr &&
         ((taps == 3 && p.y.phase.taps == 3) || taps == 5) && is_aligned(p.x) && p.acc_aligned &&
         reinterpret_cast<uintptr_t>(p.weight) % 16 == 0;
}

cudaError_t conv_depthwise(const GemmParams& p, cudaStream_t stream) {
  switch (p.out.acc.dtype) {
    case DType::f32:
      return launch_type<float>(p, stream);
    case DType::bf16:
      return launch_type<__nv_bfloat16>(p, stream);
    case DType::f16:
      return launch_type<__half>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace deltafx::cuda
