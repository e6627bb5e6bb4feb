// The end of a convolution: bias, residual, activation, and the update rule for rows of results.
// Included by kernels.inl. T is the type of the feature maps.

// The activations that are a clamp, which keeps them in registers; the others go through memory.
struct Clamp {
  bool is;
  float lo, hi;
};
inline Clamp clamp_of(const Activation& act) {
  constexpr float inf = __builtin_inff();
  switch (act.kind) {
    case Act::identity:
      return {true, -inf, inf};
    case Act::relu:
      return {true, 0.f, inf};
    case Act::relu6:
      return {true, 0.f, 6.f};
    case Act::hardtanh:
      return {true, act.p[0], act.p[1]};
    default:
      return {false, 0.f, 0.f};
  }
}

// Results of this size are not in the caches any more when the next op reads them.
constexpr int64_t kStreamBytes = 8 << 20;

template <class T>
struct Finish {
  const ConvParams& p;
  Clamp clamp;
  float threshold;
  Policy policy;  // none and exact comparison are told apart by `exact`
  bool exact;
  bool streams;  // every candidate is written, past the caches

  // `sites`: how many candidates the op has.
  Finish(const ConvParams& params, int64_t sites) : p(params), clamp(clamp_of(params.act)) {
    policy = p.out.truncation.policy;
    threshold = policy == Policy::none ? 0.f : *p.out.truncation.threshold;
    exact = policy != Policy::none && threshold == 0.f;
    const FeatureMap& acc = p.out.acc;
    streams = kStreams && policy == Policy::none && clamp.is && std::is_same_v<T, float> &&
              acc.c % kLanes == 0 && acc.ld % kLanes == 0 &&
              reinterpret_cast<uintptr_t>(acc.data) % sizeof(Vec) == 0 &&
              sites * acc.c * static_cast<int64_t>(sizeof(T)) > kStreamBytes;
  }

  T* acc_at(int64_t site, int64_t first) const {
    return static_cast<T*>(p.out.acc.data) + site * p.out.acc.ld + first;
  }
  const T* residual_at(int64_t site, int64_t first) const {
    return static_cast<const T*>(p.residual.data) + site * p.residual.ld + first;
  }

  // Starts fetching what rows() will compare with.
  DELTAFX_INLINE void prefetch(int64_t site, int64_t first, int64_t c) const {
    if (streams) return;
    const char* acc = reinterpret_cast<const char*>(acc_at(site, first));
    const int64_t bytes = c * static_cast<int64_t>(sizeof(T));
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(acc + b, 1);
    if (p.residual.data == nullptr) return;
    const char* residual = reinterpret_cast<const char*>(residual_at(site, first));
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(residual + b, 0);
  }

  // Channels [first, first + c), one truncation group, of `count` sites, from the sums in y, whose
  // rows are ldy apart, may be overwritten and have whole vectors of room. Sets active[i] where
  // sites[i] was written. Several threads may share a site's channels: they can only set the flag.
  void rows(float* y, int64_t ldy, const int32_t* sites, int64_t count, int64_t first, int64_t c,
            uint8_t* active) const {
    if (clamp.is && (kLanes >= 8 || c == kTruncationGroup))
      return clamped_up_to<kTruncationGroup / kLanes>(y, ldy, sites, count, first, c, active);
    for (int64_t i = 0; i < count; ++i)
      if (any_row(y + i * ldy, sites[i], first, c)) set(active + i);
  }

 private:
  static DELTAFX_INLINE void set(uint8_t* flag) {
    __atomic_store_n(flag, uint8_t{1}, __ATOMIC_RELAXED);
  }

  template <class S>
  static DELTAFX_INLINE Vec lanes_at(const S* q, int64_t i, int64_t c) {
    return i + kLanes <= c ? load(q + i) : load_some(q + i, c - i);
  }

  // One site, any activation and channel count.
  bool any_row(float* y, int64_t site, int64_t first, int64_t c) const {
    T* acc = acc_at(site, first);
    if (p.bias != nullptr) {
      const float* bias = p.bias + first;
      map_row(y, c, [&](Vec v, int64_t i) { return v + lanes_at(bias, i, c); });
    }
    if (p.residual.data == nullptr) return update_group(p.out, p.act, y, acc, first, c);
    const T* residual = residual_at(site, first);
    if (p.residual_after_act) activate(p.act, y, first, c);
    map_row(y, c, [&](Vec v, int64_t i) { return v + lanes_at(residual, i, c); });
    const Activation none{Act::identity, {}, nullptr};
    return update_group(p.out, p.residual_after_act ? none : p.act, y, acc, first, c);
  }

  // Picks the number of vectors; with short vectors only for a full group, to keep the code small.
  template <int V>
  void clamped_up_to(const float* y, int64_t ldy, const int32_t* sites, int64_t count,
                     int64_t first, int64_t c, uint8_t* active) const {
    if (c == V * kLanes) return clamped_rows<V>(y, ldy, sites, count, first, c, active, AllLanes{});
    if constexpr (kLanes >= 8) {
      if (c > (V - 1) * kLanes)
        return clamped_rows<V>(y, ldy, sites, count, first, c, active, c - (V - 1) * kLanes);
      if constexpr (V > 1) clamped_up_to<V - 1>(y, ldy, sites, count, first, c, active);
    }
  }

  // rows() for an activation that is a clamp: all in V registers, of the last one `lanes`.
  template <int V, class Lanes>
  __attribute__((noinline)) void clamped_rows(const float* y, int64_t ldy, const int32_t* sites,
                                              int64_t count, int64_t first, int64_t c,
                                              uint8_t* active, Lanes lanes) const {
    const Vec lo = splat(clamp.lo), hi = splat(clamp.hi);
    const bool before = p.residual.data != nullptr && !p.residual_after_act;
    const bool after = p.residual.data != nullptr && p.residual_after_act;
    Vec bias[V] = {};
    if (p.bias != nullptr) add<V>(bias, p.bias + first, lanes);
    for (int64_t r = 0; r < count; ++r, y += ldy) {
      T* acc = acc_at(sites[r], first);
      const T* residual = p.residual.data == nullptr ? nullptr : residual_at(sites[r], first);
      Vec v[V];
#pragma GCC unroll 16
      for (int i = 0; i < V; ++i) v[i] = load(y + i * kLanes) + bias[i];
      if (before) add<V>(v, residual, lanes);
#pragma GCC unroll 16
      for (int i = 0; i < V; ++i) v[i] = min_of(hi, max_of(lo, v[i]));
      if (after) add<V>(v, residual, lanes);
#pragma GCC unroll 16
      for (int i = 0; i < V; ++i) v[i] = rounded_to(v[i], acc);
      v[V - 1] = only_lanes(v[V - 1], lanes);
      if (policy != Policy::none && !differs<V>(v, acc, first, c, lanes)) continue;
      if (std::is_same_v<Lanes, AllLanes> && streams) {
#pragma GCC unroll 16
        for (int i = 0; i < V; ++i) stream(acc + i * kLanes, v[i]);
        set(active + r);
        continue;
      }
#pragma GCC unroll 16
      for (int i = 0; i < V - 1; ++i) store(acc + i * kLanes, v[i]);
      store_lanes(acc + (V - 1) * kLanes, v[V - 1], lanes);
      set(active + r);
    }
  }

  // Vector i of V.
  template <int V, class S, class Lanes>
  static DELTAFX_INLINE Vec part(const S* q, int i, Lanes lanes) {
    return i < V - 1 ? load(q + i * kLanes) : load_lanes(q + i * kLanes, lanes);
  }

  template <int V, class S, class Lanes>
  static DELTAFX_INLINE void add(Vec* v, const S* q, Lanes lanes) {
#pragma GCC unroll 16
    for (int i = 0; i < V; ++i) v[i] += part<V>(q, i, lanes);
  }

  // changed() of truncate.inl, on registers and with its order of summation.
  template <int V, class Lanes>
  DELTAFX_INLINE bool differs(const Vec* v, const T* acc, int64_t first, int64_t c,
                              Lanes lanes) const {
    if (exact) {
      IntVec different = {};
#pragma GCC unroll 16
      for (int i = 0; i < V; ++i) different |= v[i] != part<V>(acc, i, lanes);
      return any_lane(different);
    }
    const float* scale = p.out.truncation.inv_scale + first;
    const auto change = [&](int i) __attribute__((always_inline)) {
      return (v[i] - part<V>(acc, i, lanes)) * part<V>(scale, i, lanes);
    };
    if (policy == Policy::rms) {
      Vec total = {};
#pragma GCC unroll 16
      for (int i = 0; i < V; ++i) {
        const Vec delta = change(i);
        total += delta * delta;
      }
      return !(sum_of(total) <= threshold * threshold * static_cast<float>(c));
    }
    IntVec beyond = {};
#pragma GCC unroll 16
    for (int i = 0; i < V; ++i) beyond |= ~(abs_of(change(i)) <= threshold);
    return any_lane(beyond);
  }
};
