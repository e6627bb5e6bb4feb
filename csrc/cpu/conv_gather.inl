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
class Gather {
 public:
  Gather(const ConvParams& p, const ConvPhase& phase, int64_t first, int64_t channels)
      : p_(p), phase_(phase), first_(first), channels_(channels) {
    whole_ = p.x.ld == channels && p.pre_scale == nullptr;
    x_ = static_cast<const T*>(p.x.data) + first;
    end_ = static_cast<const T*>(p.x.data) + (p.x.sites() - 1) * p.x.ld + p.x.c;
    for (const ConvRun& run : phase.runs) {
      lo_y_ = run.dy < lo_y_ ? run.dy : lo_y_;
      hi_y_ = run.dy > hi_y_ ? run.dy : hi_y_;
      lo_x_ = run.dx < lo_x_ ? run.dx : lo_x_;
      hi_x_ = run.dx + run.taps - 1 > hi_x_ ? run.dx + run.taps - 1 : hi_x_;
    }
    const int64_t longest = whole_ ? (hi_x_ - lo_x_ + 1) * channels : channels;
    reach_ = (hi_y_ * p.x.w + hi_x_) * p.x.ld + longest + kLanes;
  }

  // dst: a row with kRowSlack floats of room behind it.
  void row(int64_t n, int64_t by, int64_t bx, float* dst) const {
    const T* base = x_ + ((n * p_.x.h + by) * p_.x.w + bx) * p_.x.ld;
    if (by + lo_y_ >= 0 && by + hi_y_ < p_.x.h && bx + lo_x_ >= 0 && bx + hi_x_ < p_.x.w &&
        end_ - base >= reach_ && p_.pre_scale == nullptr)
      inner_row(base, dst);
    else
      border_row(n, by, bx, dst);
  }

 private:
  // All taps are inside, and so is what whole vectors read beyond them.
  DELTAFX_INLINE void inner_row(const T* base, float* dst) const {
    for (const ConvRun& run : phase_.runs) {
      const T* src = base + (run.dy * p_.x.w + run.dx) * p_.x.ld;
      const int64_t pieces = whole_ ? 1 : run.taps;
      const int64_t size = whole_ ? run.taps * channels_ : channels_;
      for (int64_t t = 0; t < pieces; ++t, src += p_.x.ld, dst += size)
        for (int64_t i = 0; i < size; i += kLanes) store(dst + i, load(src + i));
    }
  }

  void border_row(int64_t n, int64_t by, int64_t bx, float* dst) const {
    for (const ConvRun& run : phase_.runs) {
      const int64_t size = run.taps * channels_;
      const int64_t iy = by + run.dy, ix = bx + run.dx;
      const int64_t lo = ix < 0 ? -ix : 0;
      const int64_t hi = ix + run.taps > p_.x.w ? p_.x.w - ix : run.taps;
      if (iy < 0 || iy >= p_.x.h || lo >= hi) {
        zero_floats(dst, size);
      } else {
        zero_floats(dst, lo * channels_);
        const T* src = x_ + ((n * p_.x.h + iy) * p_.x.w + ix + lo) * p_.x.ld;
        if (whole_) {
          copy_floats(dst + lo * channels_, src, (hi - lo) * channels_, end_);
        } else {
          for (int64_t t = lo; t < hi; ++t, src += p_.x.ld) {
            copy_floats(dst + t * channels_, src, channels_, end_);
            if (p_.pre_scale != nullptr) prologue(dst + t * channels_);
          }
        }
        zero_floats(dst + hi * channels_, (run.taps - hi) * channels_);
      }
      dst += size;
    }
  }

  // One tap's channels in place: act(x * scale + shift).
  void prologue(float* dst) const {
    const float* scale = p_.pre_scale + first_;
    const float* shift = p_.pre_shift + first_;
    for (int64_t c = 0; c < channels_; ++c) dst[c] = dst[c] * scale[c] + shift[c];
    activate(p_.pre_act, dst, first_, channels_);
  }

  const ConvParams& p_;
  const ConvPhase& phase_;
  int64_t first_, channels_;
  bool whole_;  // a run of taps is one contiguous piece of memory
  const T* x_;
  const T* end_;
  int64_t lo_y_ = 0, hi_y_ = 0, lo_x_ = 0, hi_x_ = 0;  // of the taps, 0 included
  int64_t reach_;  // elements from the base to the end of what an inner row may read
};
