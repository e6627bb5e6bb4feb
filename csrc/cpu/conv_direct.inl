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

// y[r * ldy + ...] for R sites `step` elements apart, V vectors of channels, of which
// the last is `lanes` wide. x and weights point at the first channel.
template <class T, int G, int R, int V, class Lanes>
__attribute__((noinline)) void direct_tile(const T* x, int64_t step, const DirectTaps& taps,
                                           const float* weights, int64_t channels, Lanes lanes,
                                           float* y, int64_t ldy) {
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
    for (int v = 0; v < V; ++v) store(y + r * ldy + v * kLanes, acc[r][v]);
}

// Channels [0, count) of R sites; whole vectors of y are written.
template <class T, int G, int R>
inline void direct_rows(const T* x, int64_t step, const DirectTaps& taps, const float* weights,
                        int64_t channels, int64_t count, float* y, int64_t ldy) {
  int64_t c = 0;
  if constexpr (kLanes == 16 && G == 1)  // 32 registers
    for (; c + 4 * kLanes <= count; c += 4 * kLanes)
      direct_tile<T, G, R, 4>(x + c, step, taps, weights + c, channels, AllLanes{}, y + c, ldy);
  for (; c + 2 * kLanes <= count; c += 2 * kLanes)
    direct_tile<T, G, R, 2>(x + c, step, taps, weights + c, channels, AllLanes{}, y + c, ldy);
  for (; c + kLanes <= count; c += kLanes)
    direct_tile<T, G, R, 1>(x + c, step, taps, weights + c, channels, AllLanes{}, y + c, ldy);
  if (c < count)
    direct_tile<T, G, R, 1>(x + c, step, taps, weights + c, channels, count - c, y + c, ldy);
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

// Cuts a list of sites into runs of at most kDirectSites neighbours that meet the same taps.
template <class T>
class DirectWindow {
 public:
  DirectWindow(const ConvParams& p, const ConvPhase& phase)
      : p_(p), phase_(phase), offsets_(2 * phase.taps.size()), index_(2 * phase.taps.size()) {
    for (size_t t = 0; t < phase.taps.size(); ++t) {
      const ConvTap& tap = phase.taps[t];
      offsets_[t] = (tap.dy * p.x.w + tap.dx) * p.x.ld;
      index_[t] = static_cast<int32_t>(t);
      lo_y_ = tap.dy < lo_y_ ? tap.dy : lo_y_;
      hi_y_ = tap.dy > hi_y_ ? tap.dy : hi_y_;
      lo_x_ = tap.dx < lo_x_ ? tap.dx : lo_x_;
      hi_x_ = tap.dx > hi_x_ ? tap.dx : hi_x_;
    }
    all_ = {offsets_.data(), index_.data(), static_cast<int64_t>(phase.taps.size())};
  }

  // f(base, step, rows, taps, i) for sites [i, i + rows): their windows start at base, base + step,
  // ... With `single`, every site is a run by itself.
  template <class F>
  void for_runs(const int32_t* sites, int64_t count, bool single, const F& f) {
    const ConvGeometry& g = p_.geometry;
    const int64_t out_step = conv_out_step(g), in_step = conv_in_step(g);
    SiteWalk walk(p_.out.acc);
    for (int64_t i = 0; i < count;) {
      const int64_t ox = walk.to(sites[i]);
      const int64_t by = conv_base(g, g.y, walk.y), bx = conv_base(g, g.x, ox);
      int rows = 1;
      while (rows < kDirectSites && i + rows < count &&
             sites[i + rows] == sites[i] + rows * out_step && ox + rows * out_step < walk.w)
        ++rows;
      const bool inner_y = by + lo_y_ >= 0 && by + hi_y_ < p_.x.h;
      const bool inner = inner_y && bx + lo_x_ >= 0 && bx + hi_x_ < p_.x.w;
      // Of a run that reaches over the border its first site is done alone, and the rest tried
      // again.
      if (!inner || bx + (rows - 1) * in_step + hi_x_ >= p_.x.w || single) rows = 1;
      const T* base =
          static_cast<const T*>(p_.x.data) + ((walk.n * p_.x.h + by) * p_.x.w + bx) * p_.x.ld;
      f(base, in_step * p_.x.ld, rows, inner ? all_ : inside(by, bx), i);
      i += rows;
    }
  }

 private:
  DirectTaps inside(int64_t by, int64_t bx) {
    const size_t taps = phase_.taps.size();
    size_t count = taps;
    for (size_t t = 0; t < taps; ++t) {
      const ConvTap& tap = phase_.taps[t];
      const int64_t y = by + tap.dy, x = bx + tap.dx;
      if (y < 0 || y >= p_.x.h || x < 0 || x >= p_.x.w) continue;
      offsets_[count] = offsets_[t];
      index_[count++] = index_[t];
    }
    return {offsets_.data() + taps, index_.data() + taps, static_cast<int64_t>(count - taps)};
  }

  const ConvParams& p_;
  const ConvPhase& phase_;
  std::vector<int64_t> offsets_;  // of all taps, and behind them of those inside at a border
  std::vector<int32_t> index_;
  DirectTaps all_;
  int64_t lo_y_ = 0, hi_y_ = 0, lo_x_ = 0, hi_x_ = 0;
};

// direct_rows for a number of sites known at run time only.
template <class T, int G>
inline void direct_run(int rows, const T* x, int64_t step, const DirectTaps& taps,
                       const float* weights, int64_t channels, int64_t count, float* y,
                       int64_t ldy) {
  if (rows == 4) return direct_rows<T, G, 4>(x, step, taps, weights, channels, count, y, ldy);
  if (rows == 3) return direct_rows<T, G, 3>(x, step, taps, weights, channels, count, y, ldy);
  if (rows == 2) return direct_rows<T, G, 2>(x, step, taps, weights, channels, count, y, ldy);
  return direct_rows<T, G, 1>(x, step, taps, weights, channels, count, y, ldy);
}

template <class T>
class DirectConv {
 public:
  DirectConv(const ConvParams& p, const ConvSites& work)
      : p_(p),
        work_(work),
        window_(p, work.phase),
        finish_(p, work.count),
        weights_(p.weight + work.phase.weights) {}

  void range(int64_t begin, int64_t end) {
    window_.for_runs(work_.sites + begin, end - begin, p_.pre_scale != nullptr,
                     [&](const T* base, int64_t step, int rows, const DirectTaps& taps, int64_t i) {
                       run(base, step, rows, taps, begin + i);
                     });
  }

 private:
  // Candidates [i, i + rows), which are neighbours with the same taps.
  void run(const T* base, int64_t step, int rows, const DirectTaps& taps, int64_t i) {
    alignas(64) float y[kDirectSites * kTruncationGroup];
    constexpr int64_t ldy = kTruncationGroup;
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
          direct_site(p_, group, x + r * step, taps, w, first, count, y + r * ldy);
      else if (group == 1)
        direct_run<T, 1>(rows, x, step, taps, w, channels, count, y, ldy);
      else if (group == 2)
        direct_run<T, 2>(rows, x, step, taps, w, channels, count, y, ldy);
      else if (group == 4)
        direct_run<T, 4>(rows, x, step, taps, w, channels, count, y, ldy);
      else if constexpr (kLanes >= 8)
        direct_run<T, 8>(rows, x, step, taps, w, channels, count, y, ldy);
      finish_.rows(y, ldy, work_.sites + i, rows, first, count, work_.active + i);
    }
  }

  const ConvParams& p_;
  const ConvSites& work_;
  DirectWindow<T> window_;
  Finish<T> finish_;
  const float* weights_;
};

// The depthwise half of a separable convolution: rows for the product, as gathering would leave
// them.
template <class T>
class DepthwiseRows {
 public:
  explicit DepthwiseRows(const ConvParams& p)
      : p_(p),
        layout_(conv_layout(depthwise_geometry(p))),
        window_(p, layout_.phases[0]),
        clamp_(clamp_of(p.depthwise.act)) {}

  // Row i of dst for sites[i]; dst has a vector of room behind each row.
  void rows(const int32_t* sites, int64_t count, float* dst, int64_t ld) {
    const int64_t c = p_.x.c;
    window_.for_runs(sites, count, false,
                     [&](const T* base, int64_t step, int rows, const DirectTaps& taps, int64_t i) {
                       float* y = dst + i * ld;
                       direct_run<T, 1>(rows, base, step, taps, p_.depthwise.weight, c, c, y, ld);
                       for (int r = 0; r < rows; ++r, y += ld) finish(y, c);
                     });
  }

 private:
  void finish(float* y, int64_t c) const {
    const float* bias = p_.depthwise.bias;
    if (!clamp_.is) {
      if (bias != nullptr)
        for_vectors(c, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
          store_lanes(y + i, load_lanes(y + i, lanes) + load_lanes(bias + i, lanes), lanes);
        });
      return activate(p_.depthwise.act, y, 0, c);
    }
    const Vec lo = splat(clamp_.lo), hi = splat(clamp_.hi);
    for_vectors(c, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      Vec v = load_lanes(y + i, lanes);
      if (bias != nullptr) v += load_lanes(bias + i, lanes);
      store_lanes(y + i, min_of(hi, max_of(lo, v)), lanes);
    });
  }

  const ConvParams& p_;
  ConvLayout layout_;
  DirectWindow<T> window_;
  Clamp clamp_;
};
