// Depthwise convolution: vectors along the channels, several neighbouring sites at once so that
// each weight is loaded once for all of them. Included by kernels.inl.

// The taps of a window that lie inside the input, in the packed order. An inner site has them all.
struct DepthwiseTaps {
  const int64_t* offset;  // elements from the site's base
  const int32_t* index;   // which tap of the packed weights
  int64_t count;
};

constexpr int kDepthwiseSites = 4;

// y[r * kTruncationGroup + ...] for R sites `step` elements apart, V vectors of channels. x and
// weights point at the first channel.
template <class T, int R, int V>
__attribute__((noinline)) void depthwise_tile(const T* x, int64_t step, const DepthwiseTaps& taps,
                                              const float* weights, int64_t channels, float* y) {
  Vec acc[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = Vec{};
  const int64_t* offset = taps.offset;
  const int32_t* index = taps.index;
  for (const int64_t* end = offset + taps.count; offset != end; ++offset, ++index) {
    const T* src = x + *offset;
    const float* w = weights + *index * channels;
    Vec weight[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      weight[v] = load(w + v * kLanes);
      DELTAFX_PIN(weight[v]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r, src += step)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] += load(src + v * kLanes) * weight[v];
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(y + r * kTruncationGroup + v * kLanes, acc[r][v]);
}

// The last channels of a map whose channel count is not a whole number of vectors.
template <class T>
inline void depthwise_rest(const T* x, int64_t step, int rows, const DepthwiseTaps& taps,
                           const float* weights, int64_t channels, int64_t count, float* y) {
  for (int r = 0; r < rows; ++r) {
    Vec acc = {};
    for (int64_t t = 0; t < taps.count; ++t)
      acc += load_some(x + taps.offset[t] + r * step, count) *
             load_some(weights + taps.index[t] * channels, count);
    store(y + r * kTruncationGroup, acc);
  }
}

template <class T, int R>
inline void depthwise_rows(const T* x, int64_t step, const DepthwiseTaps& taps,
                           const float* weights, int64_t channels, int64_t count, float* y) {
  int64_t c = 0;
  if constexpr (kLanes == 16)  // 32 registers
    for (; c + 4 * kLanes <= count; c += 4 * kLanes)
      depthwise_tile<T, R, 4>(x + c, step, taps, weights + c, channels, y + c);
  for (; c + 2 * kLanes <= count; c += 2 * kLanes)
    depthwise_tile<T, R, 2>(x + c, step, taps, weights + c, channels, y + c);
  for (; c + kLanes <= count; c += kLanes)
    depthwise_tile<T, R, 1>(x + c, step, taps, weights + c, channels, y + c);
  if (c < count)
    depthwise_rest(x + c, step, R, taps, weights + c, channels, count - c, y + c);
}

// One site behind a prologue: each tap's channels are transformed on the way.
template <class T>
inline void depthwise_prologue(const ConvParams& p, const T* x, const DepthwiseTaps& taps,
                               const float* weights, int64_t first, int64_t count, float* y) {
  float tap[kTruncationGroup];
  for (int64_t c = 0; c < count; ++c) y[c] = 0.f;
  for (int64_t t = 0; t < taps.count; ++t) {
    const T* src = x + taps.offset[t];
    const float* w = weights + taps.index[t] * p.geometry.cout;
    for (int64_t c = 0; c < count; ++c)
      tap[c] = to_float(src[c]) * p.pre_scale[first + c] + p.pre_shift[first + c];
    activate(p.pre_act, tap, first, count);
    for (int64_t c = 0; c < count; ++c) y[c] += tap[c] * w[c];
  }
}

template <class T>
class Depthwise {
 public:
  Depthwise(const ConvParams& p, const ConvSites& work)
      : p_(p), work_(work), finish_(p), weights_(p.weight + work.phase.weights) {
    const int64_t count = static_cast<int64_t>(work.phase.taps.size());
    int64_t* offsets = scratch_of<int64_t>(Scratch::tile, 3 * count);
    int32_t* index = reinterpret_cast<int32_t*>(offsets + 2 * count);
    some_offset_ = offsets + count;
    some_index_ = index + count;
    for (int64_t t = 0; t < count; ++t) {
      const ConvTap& tap = work.phase.taps[static_cast<size_t>(t)];
      offsets[t] = (tap.dy * p.x.w + tap.dx) * p.x.ld;
      index[t] = static_cast<int32_t>(t);
      lo_y_ = tap.dy < lo_y_ ? tap.dy : lo_y_;
      hi_y_ = tap.dy > hi_y_ ? tap.dy : hi_y_;
      lo_x_ = tap.dx < lo_x_ ? tap.dx : lo_x_;
      hi_x_ = tap.dx > hi_x_ ? tap.dx : hi_x_;
    }
    all_ = {offsets, index, count};
  }

  void range(int64_t begin, int64_t end) {
    const ConvGeometry& g = p_.geometry;
    const int64_t out_step = g.transposed ? g.x.stride : 1, in_step = g.transposed ? 1 : g.x.stride;
    SiteWalk walk(p_.out.acc);
    for (int64_t i = begin; i < end;) {
      const int32_t* sites = work_.sites + i;
      const int64_t ox = walk.to(sites[0]);
      const int64_t by = conv_base(g, g.y, walk.y), bx = conv_base(g, g.x, ox);
      int rows = 1;
      while (rows < kDepthwiseSites && i + rows < end &&
             sites[rows] == sites[0] + rows * out_step && ox + rows * out_step < walk.w)
        ++rows;
      const bool inner_y = by + lo_y_ >= 0 && by + hi_y_ < p_.x.h;
      const bool inner = inner_y && bx + lo_x_ >= 0 && bx + hi_x_ < p_.x.w;
      // Of a run that reaches over the border its first site is done alone, and the rest tried again.
      if (!inner || bx + (rows - 1) * in_step + hi_x_ >= p_.x.w || p_.pre_scale != nullptr) rows = 1;
      const T* base = static_cast<const T*>(p_.x.data) + ((walk.n * p_.x.h + by) * p_.x.w + bx) * p_.x.ld;
      run(base, in_step * p_.x.ld, rows, inner ? all_ : inside(by, bx), i);
      i += rows;
    }
  }

 private:
  DepthwiseTaps inside(int64_t by, int64_t bx) {
    int64_t count = 0;
    for (int64_t t = 0; t < all_.count; ++t) {
      const ConvTap& tap = work_.phase.taps[static_cast<size_t>(t)];
      const int64_t y = by + tap.dy, x = bx + tap.dx;
      if (y < 0 || y >= p_.x.h || x < 0 || x >= p_.x.w) continue;
      some_offset_[count] = all_.offset[t];
      some_index_[count++] = all_.index[t];
    }
    return {some_offset_, some_index_, count};
  }

  // Candidates [i, i + rows), which are neighbours with the same taps.
  void run(const T* base, int64_t step, int rows, const DepthwiseTaps& taps, int64_t i) {
    alignas(64) float y[kDepthwiseSites * kTruncationGroup];
    const int64_t channels = p_.out.acc.c;
    for (int64_t first = 0; first < channels; first += kTruncationGroup) {
      const int64_t left = channels - first;
      const int64_t count = left < kTruncationGroup ? left : kTruncationGroup;
      const T* x = base + first;
      const float* w = weights_ + first;
      if (p_.pre_scale != nullptr)
        depthwise_prologue(p_, x, taps, w, first, count, y);
      else if (rows == 4)
        depthwise_rows<T, 4>(x, step, taps, w, channels, count, y);
      else if (rows == 3)
        depthwise_rows<T, 3>(x, step, taps, w, channels, count, y);
      else if (rows == 2)
        depthwise_rows<T, 2>(x, step, taps, w, channels, count, y);
      else
        depthwise_rows<T, 1>(x, step, taps, w, channels, count, y);
      finish_.rows(y, kTruncationGroup, work_.sites + i, rows, first, count, work_.active + i);
    }
  }

  const ConvParams& p_;
  const ConvSites& work_;
  Finish<T> finish_;
  const float* weights_;
  DepthwiseTaps all_;
  int64_t* some_offset_;
  int32_t* some_index_;
  int64_t lo_y_ = 0, hi_y_ = 0, lo_x_ = 0, hi_x_ = 0;
};
