// The loop that the ops share which compute each candidate by itself. Included by kernels.inl.

DELTAFX_INLINE Vec only_lanes(Vec v, AllLanes) { return v; }
DELTAFX_INLINE Vec only_lanes(Vec v, int64_t count) {
  static constexpr LaneTable lane = lane_table([](int i) { return i; });
  return select(lanes_of(lane) < static_cast<int32_t>(count), v, Vec{});
}

// Rows in scratch are padded to whole vectors, so that they are written without a tail.
DELTAFX_INLINE int64_t padded(int64_t c) { return (c + kLanes - 1) / kLanes * kLanes; }

// Channels [0, c) at data + offset as fp32: in place if they are, else converted into `buffer`.
inline const float* fp32_row(const void* data, DType dtype, int64_t offset, int64_t c,
                             float* buffer) {
  if (dtype == DType::f32) return static_cast<const float*>(data) + offset;
  const BF16* p = static_cast<const BF16*>(data) + offset;
  for_vectors(c, [&](int64_t i, auto lanes) { store(buffer + i, load_lanes(p + i, lanes)); });
  return buffer;
}
inline const float* site_row(const FeatureMap& map, int64_t site, float* buffer) {
  return fp32_row(map.data, map.dtype, site * map.ld, map.c, buffer);
}

// Where every candidate is written in fp32, f computes in the accumulator itself: a row of scratch
// and a copy from it would be another pass over the first cache.
template <class T>
DELTAFX_INLINE bool in_place(const Output& out) {
  return sizeof(T) == sizeof(float) && out.truncation.policy == Policy::none;
}

template <class T, class F>
inline void update_list(const Output& out, const Activation& act, const int32_t* list, int64_t size,
                        int64_t cost, int64_t work, const F& f) {
  const FeatureMap& acc = out.acc;
  int64_t total = 0;
  parallel_for(0, size, 1 + 16384 / cost, [&](int64_t begin, int64_t end) {
    float* y = scratch_of<float>(Scratch::rows, padded(acc.c) + work);
    float* extra = y + padded(acc.c);
    if (in_place<T>(out)) {
      for (int64_t i = begin; i < end; ++i) {
        float* row = static_cast<float*>(acc.data) + list[i] * acc.ld;
        f(list[i], row, extra);
        activate(act, row, 0, acc.c);
        out.mask.data[list[i]] = 1;
      }
      return;
    }
    int64_t count = 0;
    for (int64_t i = begin; i < end; ++i) {
      f(list[i], y, extra);
      const bool active = update_site<T>(out, act, y, list[i]);
      // Every site is one thread's alone, so the mask needs no separate pass.
      out.mask.data[list[i]] |= static_cast<uint8_t>(active);
      count += active;
    }
    __atomic_fetch_add(&total, count, __ATOMIC_RELAXED);
  });
  out.counts[0] = size;
  out.counts[1] = in_place<T>(out) ? size : total;
}

// Applies the update rule at the candidates. f(site, y, work) leaves the site's channels in y
// before the activation, touches nothing beyond them, and may use `work` floats at work. `cost`:
// elements read or written a site.
template <class F>
inline void update_candidates(const Output& out, const Activation& act, Candidates& candidates,
                              int64_t cost, int64_t work, const F& f) {
  const int32_t* list = candidates.list();
  if (out.acc.dtype == DType::bf16)
    update_list<BF16>(out, act, list, candidates.size(), cost, work, f);
  else
    update_list<float>(out, act, list, candidates.size(), cost, work, f);
}

// Where a site of a map lies. 32-bit division, as it is several times faster.
struct Position {
  int64_t n, y, x;
};
DELTAFX_INLINE Position position_of(const FeatureMap& map, int32_t site) {
  const uint32_t s = static_cast<uint32_t>(site), w = static_cast<uint32_t>(map.w),
                 h = static_cast<uint32_t>(map.h), row = s / w, n = row / h;
  return {n, row - n * h, s - row * w};
}

// Sites that no input reaches (a border, a window in the padding alone) hold a constant, and are
// candidates only when it is lost: where the first channel of the rectangle's first site is NaN.
inline void add_lost(Candidates& candidates, const FeatureMap& acc, int64_t y0, int64_t y1,
                     int64_t x0, int64_t x1) {
  if (y0 >= y1 || x0 >= x1) return;
  for (int64_t n = 0; n < acc.n; ++n) {
    const int64_t offset = ((n * acc.h + y0) * acc.w + x0) * acc.ld;
    const float first = acc.dtype == DType::bf16
                            ? to_float(static_cast<const BF16*>(acc.data)[offset])
                            : static_cast<const float*>(acc.data)[offset];
    if (first != first) candidates.add_rectangle(n, y0, y1, x0, x1);
  }
}
