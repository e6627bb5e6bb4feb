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
    piece_ = whole_ && !phase.runs.empty() ? phase.runs[0].taps * channels : channels;
    reach_ = (hi_y_ * p.x.w + hi_x_) * p.x.ld + piece_ + kLanes;
    for (const ConvRun& run : phase.runs)
      for (int64_t t = 0; t < (whole_ ? 1 : run.taps); ++t)
        offsets_.push_back((run.dy * p.x.w + run.dx + t) * p.x.ld);
  }

  // Sites whose bases are (n, by, bx), (n, by, bx + step), ... of which there are `count`; dst:
  // rows lda apart with kRowSlack floats of room behind each.
  void rows(int64_t n, int64_t by, int64_t bx, int64_t step, int64_t count, float* dst,
            int64_t lda) const {
    const int64_t last = bx + (count - 1) * step;
    const T* base = x_ + ((n * p_.x.h + by) * p_.x.w + bx) * p_.x.ld;
    if (by + lo_y_ >= 0 && by + hi_y_ < p_.x.h && bx + lo_x_ >= 0 && last + hi_x_ < p_.x.w &&
        end_ - base - (last - bx) * p_.x.ld >= reach_ && p_.pre_scale == nullptr) {
      if (piece_ <= kLanes) return inner_rows<1>(base, step, count, dst, lda);
      if (piece_ <= 2 * kLanes) return inner_rows<2>(base, step, count, dst, lda);
      return inner_rows<0>(base, step, count, dst, lda);
    }
    if (count == 1) return border_row(n, by, bx, dst);
    for (int64_t i = 0; i < count; ++i, bx += step, dst += lda) rows(n, by, bx, step, 1, dst, lda);
  }

 private:
  // All taps are inside, and so is what whole vectors read beyond them. A piece takes V vectors, or
  // any number if V is 0. All pieces are equally long: the kernel is a rectangle in every phase.
  template <int V>
  void inner_rows(const T* base, int64_t step, int64_t count, float* dst, int64_t lda) const {
    const int64_t* const offsets = offsets_.data();
    const int64_t pieces = static_cast<int64_t>(offsets_.size());
    for (int64_t r = 0; r < count; ++r, base += step * p_.x.ld, dst += lda) {
      float* to = dst;
      for (int64_t i = 0; i < pieces; ++i, to += piece_) {
        const T* src = base + offsets[i];
        if constexpr (V == 0)
          for (int64_t c = 0; c < piece_; c += kLanes) store(to + c, load(src + c));
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) store(to + v * kLanes, load(src + v * kLanes));
      }
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
  int64_t piece_;                                      // floats copied at once
  int64_t reach_;                 // elements from the base to the end of what an inner row may read
  std::vector<int64_t> offsets_;  // of the pieces, from the base
};
