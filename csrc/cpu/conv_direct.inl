// Depthwise convolution, and small groups: vectors along the channels, several neighbouring sites
// at once so that each weight is loaded once for all of them. A lane is an output channel; with
// groups of G channels the input lanes are spread so that it meets each input of its group in turn.
// Included by kernels.inl. G is the size of a group, 1 for depthwise.

// The taps of a window that lie inside the input, in the packed order. An inner site has them all.
struct DirectTaps {
  const int64_t* offset;  // elements from the site's base
  const int32_t* index;   // which tap of the packed weights
  int64_t count;
};

constexpr int kDirectSites = 4;

// Lane i of the result is lane (i / G) * G + I of v: input I of the group of every lane.
template <int G, int I>
DELTAFX_INLINE Vec spread(Vec v) {
  if constexpr (G == 1) return v;
  static constexpr LaneTable from = lane_table([](int i) { return i / G * G + I; });
  return __builtin_shuffle(v, lanes_of(from));
}

// acc[r][v] += inputs I, I + 1, ... G - 1 of the groups times their weights, `channels` apart.
template <int G, int I, int R, int V, class Lanes>
DELTAFX_INLINE void direct_inputs(const Vec (&x)[R][V], const float* w, int64_t channels,
                                  Lanes lanes, Vec (&acc)[R][V]) {
  if constexpr (I < G) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      Vec weight = load_lanes(w + v * kLanes, lanes);
      DELTAFX_PIN(weight);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r][v] += spread<G, I>(x[r][v]) * weight;
    }
    direct_inputs<G, I + 1, R, V>(x, w + channels, channels, lanes, acc);
  }
}

// y[r * kTruncationGroup + ...] for R sites `step` elements apart, V vectors of channels, of which
// the last is `lanes` wide. x and weights point at the first channel.
template <class T, int G, int R, int V, class Lanes>
__attribute__((noinline)) void direct_tile(const T* x, int64_t step, const DirectTaps& taps,
                                           const float* weights, int64_t channels, Lanes lanes,
                                           float* y) {
  Vec acc[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = Vec{};
  const int64_t* offset = taps.offset;
  const int32_t* index = taps.index;
  for (const int64_t* end = offset + taps.count; offset != end; ++offset, ++index) {
    const T* src = x + *offset;
    Vec in[R][V];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r, src += step)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) in[r][v] = load_lanes(src + v * kLanes, lanes);
    direct_inputs<G, 0, R, V>(in, weights + *index * G * channels, channels, lanes, acc);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(y + r * kTruncationGroup + v * kLanes, acc[r][v]);
}

// Channels [0, count <= kTruncationGroup) of R sites.
template <class T, int G, int R>
inline void direct_rows(const T* x, int64_t step, const DirectTaps& taps, const float* weights,
                        int64_t channels, int64_t count, float* y) {
  int64_t c = 0;
  if constexpr (kLanes == 16 && G == 1)  // 32 registers
    for (; c + 4 * kLanes <= count; c += 4 * kLanes)
      direct_tile<T, G, R, 4>(x + c, step, taps, weights + c, channels, AllLanes{}, y + c);
  for (; c + 2 * kLanes <= count; c += 2 * kLanes)
    direct_tile<T, G, R, 2>(x + c, step, taps, weights + c, channels, AllLanes{}, y + c);
  for (; c + kLanes <= count; c += kLanes)
    direct_tile<T, G, R, 1>(x + c, step, taps, weights + c, channels, AllLanes{}, y + c);
  if (c < count)
    direct_tile<T, G, R, 1>(x + c, step, taps, weights + c, channels, count - c, y + c);
}

// Groups wider than a vector, and prologues, one site at a time and by the definition.
template <class T>
inline void direct_site(const ConvParams& p, int64_t group, const T* x, const DirectTaps& taps,
                        const float* weights, int64_t first, int64_t count, float* y) {
  float in[kTruncationGroup];
  for (int64_t c = 0; c < count; ++c) y[c] = 0.f;
  for (int64_t t = 0; t < taps.count; ++t) {
    const T* src = x + taps.offset[t];
    for (int64_t c = 0; c < count; ++c) in[c] = to_float(src[c]);
    if (p.pre_scale != nullptr) {
      for (int64_t c = 0; c < count; ++c)
        in[c] = in[c] * p.pre_scale[first + c] + p.pre_shift[first + c];
      activate(p.pre_act, in, first, count);
    }
    const float* w = weights + taps.index[t] * group * p.geometry.cout;
    for (int64_t i = 0; i < group; ++i, w += p.geometry.cout)
      for (int64_t c = 0; c < count; ++c) y[c] += in[c / group * group + i] * w[c];
  }
}

template <class T>
class DirectConv {
 public:
  DirectConv(const ConvParams& p, const ConvSites& work)
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
    const int64_t out_step = conv_out_step(g), in_step = conv_in_step(g);
    SiteWalk walk(p_.out.acc);
    for (int64_t i = begin; i < end;) {
      const int32_t* sites = work_.sites + i;
      const int64_t ox = walk.to(sites[0]);
      const int64_t by = conv_base(g, g.y, walk.y), bx = conv_base(g, g.x, ox);
      int rows = 1;
      while (rows < kDirectSites && i + rows < end && sites[rows] == sites[0] + rows * out_step &&
             ox + rows * out_step < walk.w)
        ++rows;
      const bool inner_y = by + lo_y_ >= 0 && by + hi_y_ < p_.x.h;
      const bool inner = inner_y && bx + lo_x_ >= 0 && bx + hi_x_ < p_.x.w;
      // Of a run that reaches over the border its first site is done alone, and the rest tried
      // again.
      if (!inner || bx + (rows - 1) * in_step + hi_x_ >= p_.x.w || p_.pre_scale != nullptr)
        rows = 1;
      const T* base =
          static_cast<const T*>(p_.x.data) + ((walk.n * p_.x.h + by) * p_.x.w + bx) * p_.x.ld;
      run(base, in_step * p_.x.ld, rows, inner ? all_ : inside(by, bx), i);
      i += rows;
    }
  }

 private:
  DirectTaps inside(int64_t by, int64_t bx) {
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
  void run(const T* base, int64_t step, int rows, const DirectTaps& taps, int64_t i) {
    alignas(64) float y[kDirectSites * kTruncationGroup];
    const int64_t channels = p_.out.acc.c;
    for (int64_t first = 0; first < channels; first += kTruncationGroup) {
      const int64_t left = channels - first;
      const int64_t count = left < kTruncationGroup ? left : kTruncationGroup;
      for (int r = 0; r < rows; ++r) finish_.prefetch(work_.sites[i + r], first, count);
      const T* x = base + first;
      const float* w = weights_ + first;
      const int64_t group = work_.layout.cin;
      if (p_.pre_scale != nullptr || group > kLanes)
        for (int r = 0; r < rows; ++r)
          direct_site(p_, group, x + r * step, taps, w, first, count, y + r * kTruncationGroup);
      else if (group == 1)
        tile<1>(rows, x, step, taps, w, count, y);
      else if (group == 2)
        tile<2>(rows, x, step, taps, w, count, y);
      else if (group == 4)
        tile<4>(rows, x, step, taps, w, count, y);
      else if constexpr (kLanes >= 8)
        tile<8>(rows, x, step, taps, w, count, y);
      finish_.rows(y, kTruncationGroup, work_.sites + i, rows, first, count, work_.active + i);
    }
  }

  template <int G>
  void tile(int rows, const T* x, int64_t step, const DirectTaps& taps, const float* w,
            int64_t count, float* y) const {
    const int64_t channels = p_.out.acc.c;
    if (rows == 4) return direct_rows<T, G, 4>(x, step, taps, w, channels, count, y);
    if (rows == 3) return direct_rows<T, G, 3>(x, step, taps, w, channels, count, y);
    if (rows == 2) return direct_rows<T, G, 2>(x, step, taps, w, channels, count, y);
    return direct_rows<T, G, 1>(x, step, taps, w, channels, count, y);
  }

  const ConvParams& p_;
  const ConvSites& work_;
  Finish<T> finish_;
  const float* weights_;
  DirectTaps all_;
  int64_t* some_offset_;
  int32_t* some_index_;
  int64_t lo_y_ = 0, hi_y_ = 0, lo_x_ = 0, hi_x_ = 0;
};
