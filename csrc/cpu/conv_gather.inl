// Gathering: the window of a site as one contiguous fp32 row [tap][channel], the padding as zeros.
// Included by kernels.inl. T is the type of the feature maps.

// Slack behind a row, so that copies may run over by less than a vector.
constexpr int64_t kRowSlack = 16;

// Row stride for k elements: never a multiple of the 2 KB that would map the rows of a tile onto
// the same few cache sets.
inline int64_t row_stride(int64_t k) {
  const int64_t stride = (k + 15) / 16 * 16 + kRowSlack;
  return stride % 512 == 0 ? stride + 16 : stride;
}

inline void zero_floats(float* dst, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store(dst + i, Vec{});
}

// dst has kRowSlack floats behind it; src may be read up to `end`.
template <class T>
DELTAFX_INLINE void copy_floats(float* dst, const T* src, int64_t count, const T* end) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(dst + i, load(src + i));
  if (i == count) return;
  if (end - (src + i) >= kLanes)
    store(dst + i, load(src + i));
  else
    for (; i < count; ++i) dst[i] = to_float(src[i]);
}

// Turns site indices into coordinates; cheap when they come in ascending order.
struct SiteWalk {
  int64_t h, w;
  int64_t n = 0, y = 0, row = 0;  // row: index of the first site of the current row
  explicit SiteWalk(const FeatureMap& map) : h(map.h), w(map.w) {}
  // Moves to `site` and returns its x.
  int64_t to(int64_t site) {
    if (site < row || site >= row + w) {
      const int64_t r = site / w;
      row = r * w;
      n = r / h;
      y = r - n * h;
    }
    return site - row;
  }
};

// Gathers channels [first, first + channels) of the phase's taps at base coordinates (n, by, bx).
template <class T>
struct Gather {
  const ConvParams& p;
  const ConvPhase& phase;
  int64_t first, channels;
  bool whole;  // a run of taps is one contiguous piece of memory
  const T* end;

  Gather(const ConvParams& params, const ConvPhase& ph, int64_t first_channel, int64_t count)
      : p(params), phase(ph), first(first_channel), channels(count) {
    whole = p.x.ld == channels && p.pre_scale == nullptr;
    end = static_cast<const T*>(p.x.data) + (p.x.sites() - 1) * p.x.ld + p.x.c;
  }

  void row(int64_t n, int64_t by, int64_t bx, float* dst) const {
    const T* x = static_cast<const T*>(p.x.data) + first;
    for (const ConvRun& run : phase.runs) {
      const int64_t size = run.taps * channels;
      const int64_t iy = by + run.dy, ix = bx + run.dx;
      const int64_t lo = ix < 0 ? -ix : 0;
      const int64_t hi = ix + run.taps > p.x.w ? p.x.w - ix : run.taps;
      if (iy < 0 || iy >= p.x.h || lo >= hi) {
        zero_floats(dst, size);
      } else {
        if (lo > 0) zero_floats(dst, lo * channels);
        const T* src = x + ((n * p.x.h + iy) * p.x.w + ix + lo) * p.x.ld;
        if (whole) {
          copy_floats(dst + lo * channels, src, (hi - lo) * channels, end);
        } else {
          for (int64_t t = lo; t < hi; ++t, src += p.x.ld) {
            copy_floats(dst + t * channels, src, channels, end);
            if (p.pre_scale != nullptr) prologue(dst + t * channels);
          }
        }
        if (hi < run.taps) zero_floats(dst + hi * channels, (run.taps - hi) * channels);
      }
      dst += size;
    }
  }

  // One tap's channels in place: act(x * scale + shift).
  void prologue(float* dst) const {
    const float* scale = p.pre_scale + first;
    const float* shift = p.pre_shift + first;
    for (int64_t c = 0; c < channels; ++c) dst[c] = dst[c] * scale[c] + shift[c];
    activate(p.pre_act, dst, first, channels);
  }
};
