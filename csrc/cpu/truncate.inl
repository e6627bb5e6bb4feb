// The third step of the update rule: compare with the accumulator, write, say whether it changed.
// Included by kernels.inl.

// True where the change of channels [first, first + c) is not within the threshold. `y` is fp32
// already rounded to T. Written as !(change <= t), so that a NaN counts as a change.
template <class T>
inline bool changed(const Truncation& truncation, const float* y, const T* acc, int64_t first,
                    int64_t c) {
  if (truncation.policy == Policy::none) return true;
  const float t = *truncation.threshold;
  if (t == 0.f) {
    IntVec differs = {};
    for_vectors(c, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      differs |= load_lanes(y + i, lanes) != load_lanes(acc + i, lanes);
    });
    return any_lane(differs);
  }
  const float* scale = truncation.inv_scale + first;
  const auto change = [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    return (load_lanes(y + i, lanes) - load_lanes(acc + i, lanes)) * load_lanes(scale + i, lanes);
  };
  if (truncation.policy == Policy::rms) {
    Vec total = {};
    for_vectors(c, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      const Vec delta = change(i, lanes);
      total += delta * delta;
    });
    return !(sum_of(total) <= t * t * static_cast<float>(c));
  }
  IntVec beyond = {};
  for_vectors(c, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    beyond |= ~(abs_of(change(i, lanes)) <= t);
  });
  return any_lane(beyond);
}

// Rounds y to T in place, so that it is compared as it would be stored.
DELTAFX_INLINE void round_row(float*, int64_t, const float*) {}
inline void round_row(float* y, int64_t c, const BF16* like) {
  map_row(y, c, [=](Vec v, int64_t) { return rounded_to(v, like); });
}

// By vectors even for fp32: a call of memcpy for so few bytes took twice as long.
template <class T>
inline void write_row(T* acc, const float* y, int64_t c) {
  for_vectors(c, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    store_lanes(acc + i, load_lanes(y + i, lanes), lanes);
  });
}

// Steps 2b and 3 for channels [first, first + c) of one site, at most one truncation group: applies
// the activation to y, compares with the accumulator's channels at `acc`, writes them if changed.
template <class T>
inline bool update_group(const Output& out, const Activation& act, float* y, T* acc, int64_t first,
                         int64_t c) {
  activate(act, y, first, c);
  round_row(y, c, acc);
  if (!changed(out.truncation, y, acc, first, c)) return false;
  write_row(acc, y, c);
  return true;
}

// The same for all channels of site `site`, in truncation groups.
template <class T>
inline bool update_site(const Output& out, const Activation& act, float* y, int64_t site) {
  T* acc = static_cast<T*>(out.acc.data) + site * out.acc.ld;
  if (out.truncation.policy == Policy::none) {
    activate(act, y, 0, out.acc.c);
    write_row(acc, y, out.acc.c);
    return true;
  }
  bool active = false;
  for (int64_t first = 0; first < out.acc.c; first += kTruncationGroup) {
    const int64_t c = out.acc.c - first < kTruncationGroup ? out.acc.c - first : kTruncationGroup;
    active |= update_group(out, act, y + first, acc + first, first, c);
  }
  return active;
}
