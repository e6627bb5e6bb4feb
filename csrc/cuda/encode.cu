// encode: a dense tensor (the frame, or a dense op's result) against its accumulator. Every site is
// a candidate, so there is no list.
#include "cuda/ops.h"
#include "cuda/sites.cuh"

namespace deltafx::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void start_kernel(int64_t* counts, int64_t candidates) {
  wait_for_inputs();
  counts[0] = candidates;
  counts[1] = 0;
}

// Adds the block's number of active sites, one per true `active`.
__device__ __forceinline__ void count_active(int64_t* counts, int found) {
  __shared__ int total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  if (found > 0) atomicAdd(&total, found);
  __syncthreads();
  if (threadIdx.x == 0 && total > 0)
    atomicAdd(reinterpret_cast<unsigned long long*>(counts + 1),
              static_cast<unsigned long long>(total));
}

__device__ __forceinline__ int64_t sites_of(const FeatureMap& map) { return map.n * map.h * map.w; }

template <class S>
__device__ __forceinline__ const S* frame_at(const EncodeParams& p, const Position& at) {
  return static_cast<const S*>(p.x) + at.n * p.stride_n + at.y * p.stride_h + at.x * p.stride_w;
}

__device__ __forceinline__ Position position_in(const FeatureMap& acc, int site) {
  return position_of(site, static_cast<int>(acc.h), static_cast<int>(acc.w));
}

// Few channels: a thread a site.
template <class S, class T>
__global__ void __launch_bounds__(kThreads) narrow_kernel(EncodeParams p) {
  wait_for_inputs();
  const FeatureMap& acc = p.out.acc;
  const Truncation& truncation = p.out.truncation;
  const int64_t site = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int c = static_cast<int>(acc.c);
  bool changed = false;
  if (site < sites_of(acc)) {
    const S* x = frame_at<S>(p, position_in(acc, static_cast<int>(site)));
    T* row = static_cast<T*>(acc.data) + site * acc.ld;
    const bool compare = truncation.policy != Policy::none;
    const float t = compare ? *truncation.threshold : 0.f;
    T y[kVector];
    float total = 0.f;
    bool beyond = false, differs = false;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i >= c) break;
      y[i] = from_float<T>(to_float(x[i * p.stride_c]));
      if (!compare) continue;
      const float change = to_float(y[i]) - to_float(row[i]);
      const float scaled = change * truncation.inv_scale[i];
      differs |= !(to_float(y[i]) == to_float(row[i]));
      beyond |= !(fabsf(scaled) <= t);
      total += scaled * scaled;
    }
    changed = !compare                           ? true
              : t == 0.f                         ? differs
              : truncation.policy == Policy::rms ? !(total <= t * t * static_cast<float>(c))
                                                 : beyond;
    if (changed) {
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        if (i < c) row[i] = y[i];
      p.out.mask.data[site] = 1;
    }
  }
  count_active(p.out.counts, changed);
}

// Many channels: a warp a site.
template <class S, class T>
__global__ void __launch_bounds__(kThreads) wide_kernel(EncodeParams p, bool aligned) {
  wait_for_inputs();
  const FeatureMap& acc = p.out.acc;
  const int64_t site = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  const int c = static_cast<int>(acc.c), lane = threadIdx.x % 32;
  int found = 0;
  if (site < sites_of(acc)) {
    const S* x = frame_at<S>(p, position_in(acc, static_cast<int>(site)));
    bool active = false;
    for (int base = 0; base < c; base += 32 * kVector) {
      const int c0 = base + lane * kVector, count = min(kVector, c - c0);
      float y[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) y[i] = i < count ? to_float(x[(c0 + i) * p.stride_c]) : 0.f;
      active |= update_group<T>(p.out, aligned, static_cast<int>(site), c0, count, y);
    }
    if (__any_sync(kAllLanes, active) && lane == 0) {
      p.out.mask.data[site] = 1;
      found = 1;
    }
  }
  count_active(p.out.counts, found);
}

// Squares of sites gated by their RMS, a warp a square: the whole square is written, or none of it.
// At threshold 0, which only the device knows, each site is gated by itself.
template <class S, class T>
__global__ void __launch_bounds__(kThreads) square_kernel(EncodeParams p, int rows, int columns) {
  wait_for_inputs();
  const FeatureMap& acc = p.out.acc;
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  const int c = static_cast<int>(acc.c), lane = threadIdx.x % 32;
  const int block = static_cast<int>(p.block);
  int found = 0;
  if (index < acc.n * rows * columns) {
    const Position square = position_of(static_cast<int>(index), rows, columns);
    const int y0 = square.y * block, x0 = square.x * block;
    const int height = min(block, static_cast<int>(acc.h) - y0);
    const int width = min(block, static_cast<int>(acc.w) - x0), size = height * width;
    const float t = *p.out.truncation.threshold;
    const auto site_at = [&](int i) {
      return (square.n * acc.h + y0 + i / width) * acc.w + x0 + i % width;
    };
    const auto row_at = [&](int i) { return static_cast<T*>(acc.data) + site_at(i) * acc.ld; };
    const auto frame_row = [&](int i) {
      return frame_at<S>(p, {square.n, y0 + i / width, x0 + i % width});
    };
    const auto write = [&](int i) {
      const S* x = frame_row(i);
      T* row = row_at(i);
      for (int k = 0; k < c; ++k) row[k] = from_float<T>(to_float(x[k * p.stride_c]));
      p.out.mask.data[site_at(i)] = 1;
      ++found;
    };
    float total = 0.f;
    for (int i = lane; i < size; i += 32) {
      const S* x = frame_row(i);
      const T* row = row_at(i);
      bool differs = false;
      for (int k = 0; k < c; ++k) {
        const float y = to_float(from_float<T>(to_float(x[k * p.stride_c])));
        const float d = (y - to_float(row[k])) * p.out.truncation.inv_scale[k];
        differs |= !(y == to_float(row[k]));
        total += d * d;
      }
      if (t == 0.f && differs) write(i);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(kAllLanes, total, step);
    if (t > 0.f && !(total <= t * t * static_cast<float>(size * c)))
      for (int i = lane; i < size; i += 32) write(i);
  }
  count_active(p.out.counts, found);
}

int blocks_for(int64_t threads) { return static_cast<int>((threads + kThreads - 1) / kThreads); }

template <class S, class T>
cudaError_t encode_as(const EncodeParams& p, cudaStream_t stream) {
  const FeatureMap& acc = p.out.acc;
  if (p.block > 1 && p.out.truncation.policy == Policy::rms) {
    const int rows = static_cast<int>((acc.h + p.block - 1) / p.block);
    const int columns = static_cast<int>((acc.w + p.block - 1) / p.block);
    return launch(square_kernel<S, T>, {blocks_for(acc.n * rows * columns * 32), kThreads}, stream,
                  p, rows, columns);
  }
  if (acc.c <= kVector)
    return launch(narrow_kernel<S, T>, {blocks_for(acc.sites()), kThreads}, stream, p);
  return launch(wide_kernel<S, T>, {blocks_for(acc.sites() * 32), kThreads}, stream, p,
                is_aligned(acc));
}

template <class S>
cudaError_t encode_from(const EncodeParams& p, cudaStream_t stream) {
  switch (p.out.acc.dtype) {
    case DType::f32:
      return encode_as<S, float>(p, stream);
    case DType::bf16:
      return encode_as<S, __nv_bfloat16>(p, stream);
    case DType::f16:
      return encode_as<S, __half>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t encode(const EncodeParams& p, cudaStream_t stream) {
  const cudaError_t error = launch(start_kernel, {1, 1}, stream, p.out.counts, p.out.acc.sites());
  if (error != cudaSuccess) return error;
  switch (p.dtype) {
    case DType::f32:
      return encode_from<float>(p, stream);
    case DType::bf16:
      return encode_from<__nv_bfloat16>(p, stream);
    case DType::f16:
      return encode_from<__half>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace deltafx::cuda
