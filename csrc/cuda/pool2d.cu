// pool2d and adaptive_pool2d: maximum or average over windows of sites.
#include "cuda/conv_query.cuh"
#include "cuda/ops.h"
#include "cuda/sites.cuh"

namespace deltafx::cuda {
namespace {

struct Range {
  int begin, end, divisor;
};

__device__ Range window_of(const PoolRule& r, int o) {
  const int start = o * r.stride - r.pad;
  const int stop = min(start + (r.kernel - 1) * r.dilation + 1, r.in + r.pad);
  const int first =
      start >= 0 ? start : start + (-start + r.dilation - 1) / r.dilation * r.dilation;
  const int last = max(min(stop, r.in), 0);
  const int own = r.count_include_pad ? stop - start : last - first;
  return {min(first, last), last, r.divisor != 0 ? r.divisor : own};
}

__device__ Range range_of(const PoolRule& r, int o) {
  if (r.kernel != 0) return window_of(r, o);
  const int begin = static_cast<int>(static_cast<int64_t>(o) * r.in / r.out);
  const int end = static_cast<int>((static_cast<int64_t>(o + 1) * r.in + r.out - 1) / r.out);
  return {begin, end, end - begin};
}

struct PoolQuery {
  FeatureMap acc;
  Mask mask;
  PoolRule y_rule, x_rule;
  bool windows;  // every window is one of a convolution, and none lies outside the input
  ConvQuery query;

  bool reads_result() const { return !windows; }
  __device__ uint32_t flags(Position at, int count) const {
    if (windows) return query.flags(at, count);
    uint32_t found = 0;
    for (int i = 0; i < count; ++i, ++at.x) found |= (is_candidate(at) ? 1u : 0u) << i;
    return found;
  }
  __device__ bool is_candidate(const Position& at) const {
    const Range ry = range_of(y_rule, at.y), rx = range_of(x_rule, at.x);
    // Where padding and ceil_mode meet, a window may lie outside the input altogether.
    if (ry.begin >= ry.end || rx.begin >= rx.end) return is_lost(acc, at);
    bool found = false;
    for (int iy = ry.begin; iy < ry.end; iy += y_rule.dilation)
      for (int ix = rx.begin; ix < rx.end; ix += x_rule.dilation)
        found |= mask.data[(at.n * mask.h + iy) * mask.w + ix] != 0;
    return found;
  }
};

// A maximum keeps a NaN, as torch's does.
__device__ __forceinline__ float combined(bool maximum, float a, float b) {
  return maximum ? max_of(a, b) : a + b;
}

__device__ __forceinline__ void divide(const Range& ry, const Range& rx, float (&y)[kVector]) {
  const bool empty = ry.begin >= ry.end || rx.begin >= rx.end;
  const float divisor = empty ? 1.f : static_cast<float>(ry.divisor * rx.divisor);
#pragma unroll
  for (int i = 0; i < kVector; ++i) y[i] = __fdiv_rn(y[i], divisor);
}

struct Pool {
  FeatureMap x;
  PoolRule y_rule, x_rule;
  bool aligned, maximum;

  __device__ void operator()(const Position& at, int, int c0, int count,
                             float (&y)[kVector]) const {
    const Range ry = range_of(y_rule, at.y), rx = range_of(x_rule, at.x);
    switch (x.dtype) {
      case DType::f32:
        gather<float>(at.n, ry, rx, c0, count, y);
        break;
      case DType::bf16:
        gather<__nv_bfloat16>(at.n, ry, rx, c0, count, y);
        break;
      case DType::f16:
        gather<__half>(at.n, ry, rx, c0, count, y);
        break;
    }
    if (!maximum) divide(ry, rx, y);
  }

 private:
  // The maximum or the sum. Some sites are read ahead, as each takes as long as an item of work.
  template <class T>
  __device__ void gather(int n, const Range& ry, const Range& rx, int c0, int count,
                         float (&y)[kVector]) const {
    constexpr int kAhead = 3;
    const T* from = static_cast<const T*>(x.data) + n * x.h * x.w * x.ld + c0;
    const float start = maximum ? -INFINITY : 0.f;
#pragma unroll
    for (int i = 0; i < kVector; ++i) y[i] = start;
    int iy = ry.begin, ix = rx.begin;
    if (ix >= rx.end) return;
    while (iy < ry.end) {
      float v[kAhead][kVector];
      bool inside[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        inside[k] = iy < ry.end;
        if (!inside[k]) continue;
        load_vector(from + (iy * x.w + ix) * x.ld, count, aligned, v[k]);
        ix += x_rule.dilation;
        if (ix >= rx.end) ix = rx.begin, iy += y_rule.dilation;
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (!inside[k]) break;
#pragma unroll
        for (int i = 0; i < kVector; ++i) y[i] = combined(maximum, y[i], v[k][i]);
      }
    }
  }
};

// Windows of kTaps x kTaps in whole vectors of T. All that are read, of fp32 those of a row, are
// asked for before the first is used.
template <class T, int kTaps>
struct SmallPool {
  FeatureMap x;
  PoolRule y_rule, x_rule;
  bool maximum;

  __device__ void operator()(const Position& at, int, int c0, int, float (&y)[kVector]) const {
    constexpr int kRows = sizeof(T) == 2 ? kTaps : 1;
    const int top = at.y * y_rule.stride - y_rule.pad, left = at.x * x_rule.stride - x_rule.pad;
    const int w = static_cast<int>(x.w), ld = static_cast<int>(x.ld);
    const int first = (at.n * static_cast<int>(x.h) + top) * w + left;
    const T* const from = static_cast<const T*>(x.data) + (static_cast<int64_t>(first) * ld + c0);
    const int right = x_rule.dilation * ld, down = y_rule.dilation * w * ld;
    const auto inside = [](const PoolRule& rule, int first, int tap) {
      return static_cast<unsigned>(first + tap * rule.dilation) < static_cast<unsigned>(rule.in);
    };
    bool columns[kTaps];
#pragma unroll
    for (int k = 0; k < kTaps; ++k) columns[k] = inside(x_rule, left, k);
    const float start = maximum ? -INFINITY : 0.f;
#pragma unroll
    for (int i = 0; i < kVector; ++i) y[i] = start;
#pragma unroll
    for (int j0 = 0; j0 < kTaps; j0 += kRows) {
      Packet<T> v[kRows][kTaps];
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
#pragma unroll
        for (int k = 0; k < kTaps; ++k) {
          if (inside(y_rule, top, j0 + j) && columns[k])
            v[j][k].load(from + ((j0 + j) * down + k * right));
        }
      }
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
#pragma unroll
        for (int k = 0; k < kTaps; ++k) {
          if (!(inside(y_rule, top, j0 + j) && columns[k])) continue;
#pragma unroll
          for (int i = 0; i < kVector; ++i)
            y[i] = combined(maximum, y[i], to_float(v[j][k].elements[i]));
        }
      }
    }
    if (!maximum) divide(window_of(y_rule, at.y), window_of(x_rule, at.x), y);
  }
};

// The windows of a rule, as those of a convolution.
GemmAxis axis_of(const PoolRule& r) {
  return {r.stride, r.pad, false, {r.kernel, -r.pad, r.dilation, 0, 0, 1}};
}

// Whether they are, and each of them meets the input.
bool are_windows(const PoolRule& r, int64_t out) {
  if (r.kernel == 0) return false;
  const GemmAxis axis = axis_of(r);
  for (int64_t o = 0; o < out; ++o)
    if (!has_tap(axis.phase, static_cast<int>(o) * axis.stride - axis.pad, r.in)) return false;
  return true;
}

template <class T>
cudaError_t pool_as(const PoolParams& p, const PoolRule& y, const PoolRule& x,
                    const PoolQuery& query, int32_t* memory, bool listed, cudaStream_t stream) {
  const auto update = [&](const auto& f) {
    return listed ? update_listed<T>(p.out, p.act, list_in(memory, p.out.counts), f, stream)
                  : update_sites_as<T>(p.out, p.act, query, f, memory, stream);
  };
  constexpr int64_t kMost = 1 << 30;  // elements from the first row of a window to its last
  const bool near = y.kernel * y.dilation * p.x.map.w * p.x.map.ld < kMost;
  if (y.kernel == x.kernel && near && is_aligned(p.x.map) && p.x.map.dtype == p.out.acc.dtype) {
    if (x.kernel == 3) return update(SmallPool<T, 3>{p.x.map, y, x, p.maximum});
    if (x.kernel == 2) return update(SmallPool<T, 2>{p.x.map, y, x, p.maximum});
  }
  return update(Pool{p.x.map, y, x, is_aligned(p.x.map), p.maximum});
}

}  // namespace

cudaError_t pool2d(const PoolParams& p, const PoolRule& y, const PoolRule& x, int32_t* memory,
                   bool listed, cudaStream_t stream) {
  const bool windows = are_windows(y, p.out.acc.h) && are_windows(x, p.out.acc.w);
  const PoolQuery query{p.out.acc, p.x.mask, y,
                        x,         windows,  {p.x.mask, {}, axis_of(y), axis_of(x), nullptr}};
  return with_type(p.out.acc.dtype, [&](auto type) {
    return pool_as<typename decltype(type)::T>(p, y, x, query, memory, listed, stream);
  });
}

}  // namespace deltafx::cuda
