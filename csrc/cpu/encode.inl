// encode: a dense tensor (the frame, or a dense op's result) against its accumulator, every site a
// candidate. Works through a row in pieces of sites small enough to stay in the first cache.
// Included by kernels.inl. S is the frame's type, T the accumulator's.

// Sites of at most this many channels are compared as one long vector, not each by itself.
constexpr int64_t kFewChannels = 4;
constexpr int64_t kPiece = 64;

// Elements of a piece one by one: C is the number of channels, or 0 where only p knows it.
template <int C, class S>
DELTAFX_INLINE void gather_piece(const S* src, const EncodeParams& p, int64_t first, int64_t count,
                                 float* piece) {
  const int64_t c = C > 0 ? C : p.out.acc.c;
  if (p.stride_w == 1)
    for (int64_t x = 0; x < count; ++x)
      for (int64_t k = first; k < c; ++k) piece[x * c + k] = to_float(src[k * p.stride_c + x]);
  else
    for (int64_t x = 0; x < count; ++x)
      for (int64_t k = first; k < c; ++k)
        piece[x * c + k] = to_float(src[k * p.stride_c + x * p.stride_w]);
}

// Swaps the odd runs of Step lanes of each row with the even ones of the row Step below.
template <int Step>
DELTAFX_INLINE void transpose_step(Vec* rows) {
  static constexpr LaneTable low =
      lane_table([](int i) { return i & Step ? kLanes + i - Step : i; });
  static constexpr LaneTable high =
      lane_table([](int i) { return i & Step ? kLanes + i : i + Step; });
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & Step) continue;
    const Vec a = rows[i], b = rows[i + Step];
    rows[i] = __builtin_shuffle(a, b, lanes_of(low));
    rows[i + Step] = __builtin_shuffle(a, b, lanes_of(high));
  }
}

// rows[i] becomes what column i was.
DELTAFX_INLINE void transpose(Vec* rows) {
  transpose_step<1>(rows);
  transpose_step<2>(rows);
  if constexpr (kLanes > 4) transpose_step<4>(rows);
  if constexpr (kLanes > 8) transpose_step<8>(rows);
}

// A planar piece of many channels, by squares: planes are often a power of two apart, and would
// push each other's lines out of the cache if each were read a value at a time.
template <class S>
inline void transpose_piece(const S* src, const EncodeParams& p, int64_t count, float* piece) {
  const int64_t c = p.out.acc.c;
  int64_t x = 0;
  for (; x + kLanes <= count; x += kLanes) {
    int64_t k = 0;
    for (; k + kLanes <= c; k += kLanes) {
      Vec rows[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) rows[i] = load(src + (k + i) * p.stride_c + x);
      transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(piece + (x + i) * c + k, rows[i]);
    }
    gather_piece<0>(src + x, p, k, kLanes, piece + x * c);
  }
  gather_piece<0>(src + x, p, 0, count - x, piece + x * c);
}

// Sites [x0, x0 + count) of row (n, y) of the frame as [count][c] fp32, rounded to T: the frame
// itself where it is stored so, else converted into `piece`.
template <class S, class T>
inline const float* frame_piece(const EncodeParams& p, int64_t n, int64_t y, int64_t x0,
                                int64_t count, float* piece) {
  constexpr bool exact = sizeof(S) == sizeof(T) || sizeof(T) == sizeof(float);
  const int64_t c = p.out.acc.c;
  const S* src = static_cast<const S*>(p.x) + n * p.stride_n + y * p.stride_h + x0 * p.stride_w;
  const bool dense = (c == 1 || p.stride_c == 1) && p.stride_w == c;
  if (dense && exact && sizeof(S) == sizeof(float)) return reinterpret_cast<const float*>(src);
  if (dense) {
    for_vectors(count * c,
                [&](int64_t i, auto lanes) { store(piece + i, load_lanes(src + i, lanes)); });
  } else if (p.stride_c == 1 && c > kFewChannels) {
    for (int64_t x = 0; x < count; ++x)
      for_vectors(c, [&](int64_t i, auto lanes) {
        store_lanes(piece + x * c + i, load_lanes(src + x * p.stride_w + i, lanes), lanes);
      });
  } else if (c == 3) {
    gather_piece<3>(src, p, 0, count, piece);
  } else if (c == 4) {
    gather_piece<4>(src, p, 0, count, piece);
  } else if (p.stride_w == 1) {
    transpose_piece(src, p, count, piece);
  } else {
    gather_piece<0>(src, p, 0, count, piece);
  }
  if (!exact) round_row(piece, count * c, static_cast<const T*>(nullptr));
  return piece;
}

// What a thread needs to compare pieces of few channels.
struct FewChannels {
  float old[kPiece * kFewChannels];
  float error[kPiece * kFewChannels];
  float scale[kPiece * kFewChannels];  // inv_scale[c], over and over
  float sum[kPiece];
  uint8_t flag[kPiece];
};

template <int C>
DELTAFX_INLINE void sum_channels(const float* __restrict error, int64_t count,
                                 float* __restrict sum) {
  for (int64_t x = 0; x < count; ++x) {
    float total = error[x * C];
    for (int k = 1; k < C; ++k) total += error[x * C + k];
    sum[x] = total;
  }
}

// few.sum[x] = the squared change of site x for the RMS; else the number of its channels that are
// not within the threshold. False, and no sums, if the piece equals the accumulator.
template <class T>
inline bool compare_piece(const Output& out, const float* y, int64_t site, int64_t count,
                          FewChannels& few) {
  const FeatureMap& acc = out.acc;
  const int64_t c = acc.c, size = count * c;
  const T* stored = static_cast<const T*>(acc.data) + site * acc.ld;
  const float* old = few.old;
  if (acc.ld == c && sizeof(T) == sizeof(float))
    old = reinterpret_cast<const float*>(stored);
  else if (acc.ld == c)
    for (int64_t i = 0; i < size; ++i) few.old[i] = to_float(stored[i]);
  else
    for (int64_t x = 0; x < count; ++x)
      for (int64_t k = 0; k < c; ++k) few.old[x * c + k] = to_float(stored[x * acc.ld + k]);

  IntVec differs = {};
  for_vectors(size, [&](int64_t i, auto lanes) {
    differs |= load_lanes(y + i, lanes) != load_lanes(old + i, lanes);
  });
  if (!any_lane(differs)) return false;

  const float t = *out.truncation.threshold;
  const bool rms = out.truncation.policy == Policy::rms && t > 0.f;
  for_vectors(size, [&](int64_t i, auto lanes) {
    const Vec delta = load_lanes(y + i, lanes) - load_lanes(old + i, lanes);
    const Vec scaled = delta * load_lanes(few.scale + i, lanes);
    const IntVec beyond = t > 0.f ? ~(abs_of(scaled) <= t)
                                  : ~(load_lanes(y + i, lanes) == load_lanes(old + i, lanes));
    store_lanes(few.error + i, rms ? scaled * scaled : select(beyond, splat(1.f), Vec{}), lanes);
  });
  switch (c) {
    case 1:
      sum_channels<1>(few.error, count, few.sum);
      return true;
    case 2:
      sum_channels<2>(few.error, count, few.sum);
      return true;
    case 3:
      sum_channels<3>(few.error, count, few.sum);
      return true;
    default:
      sum_channels<4>(few.error, count, few.sum);
      return true;
  }
}

inline void fill_scale(const EncodeParams& p, FewChannels& few) {
  if (p.out.truncation.policy == Policy::none) return;
  const int64_t c = p.out.acc.c;
  for (int64_t i = 0; i < kPiece * c; ++i) few.scale[i] = p.out.truncation.inv_scale[i % c];
}

// Writes `count` sites from `site` on and makes them active.
template <class T>
inline void write_run(const Output& out, const float* y, int64_t site, int64_t count) {
  const FeatureMap& acc = out.acc;
  T* dst = static_cast<T*>(acc.data) + site * acc.ld;
  if (acc.ld == acc.c)
    write_row(dst, y, count * acc.c);
  else
    for (int64_t x = 0; x < count; ++x) write_row(dst + x * acc.ld, y + x * acc.c, acc.c);
  __builtin_memset(out.mask.data + site, 1, static_cast<size_t>(count));
}

// Gates each site of a piece of few channels; the number of active ones.
template <class T>
inline int64_t encode_few(const Output& out, const float* y, int64_t site, int64_t count,
                          FewChannels& few) {
  const int64_t c = out.acc.c;
  const bool gated = out.truncation.policy != Policy::none;
  if (gated && !compare_piece<T>(out, y, site, count, few)) return 0;
  int64_t active = count;
  if (gated) {
    const float t = *out.truncation.threshold;
    const float limit = out.truncation.policy == Policy::rms ? t * t * static_cast<float>(c) : 0.f;
    active = 0;
    for (int64_t x = 0; x < count; ++x) {
      few.flag[x] = !(few.sum[x] <= limit);
      active += few.flag[x];
    }
  }
  if (active == count)
    write_run<T>(out, y, site, count);
  else
    for (int64_t x = 0; x < count; ++x)
      if (few.flag[x]) write_run<T>(out, y + x * c, site + x, 1);
  return active;
}

// Gates each site of a piece by itself, in truncation groups of channels.
template <class T>
inline int64_t encode_wide(const Output& out, const float* y, int64_t site, int64_t count) {
  const int64_t c = out.acc.c;
  int64_t active = 0;
  for (int64_t x = 0; x < count; ++x) {
    T* acc = static_cast<T*>(out.acc.data) + (site + x) * out.acc.ld;
    bool written = false;
    for (int64_t first = 0; first < c; first += kTruncationGroup) {
      const int64_t size = c - first < kTruncationGroup ? c - first : kTruncationGroup;
      if (!changed(out.truncation, y + x * c + first, acc + first, first, size)) continue;
      write_row(acc + first, y + x * c + first, size);
      written = true;
    }
    out.mask.data[site + x] |= static_cast<uint8_t>(written);
    active += written;
  }
  return active;
}

// Sum over the channels of a site of the scaled squared change; NaN where anything is NaN.
template <class T>
inline float squared_change(const float* y, const T* acc, const float* inv_scale, int64_t c) {
  Vec total = {};
  for_vectors(c, [&](int64_t i, auto lanes) {
    const Vec d =
        (load_lanes(y + i, lanes) - load_lanes(acc + i, lanes)) * load_lanes(inv_scale + i, lanes);
    total += d * d;
  });
  return sum_of(total);
}

// Gates block x block squares from row y0 on by their RMS: the whole square is written, or none.
// `change` [w] and `piece` are scratch.
template <class S, class T>
inline int64_t encode_blocks(const EncodeParams& p, int64_t n, int64_t y0, int64_t step,
                             float* change, float* piece, FewChannels& few) {
  const FeatureMap& acc = p.out.acc;
  const int64_t y1 = y0 + p.block < acc.h ? y0 + p.block : acc.h;
  const float t = *p.out.truncation.threshold;
  for (int64_t x = 0; x < acc.w; ++x) change[x] = 0.f;
  for (int64_t y = y0; y < y1; ++y)
    for (int64_t x0 = 0; x0 < acc.w; x0 += step) {
      const int64_t count = x0 + step < acc.w ? step : acc.w - x0;
      const int64_t site = (n * acc.h + y) * acc.w + x0;
      const float* frame = frame_piece<S, T>(p, n, y, x0, count, piece);
      if (acc.c <= kFewChannels) {
        if (compare_piece<T>(p.out, frame, site, count, few))
          for (int64_t x = 0; x < count; ++x) change[x0 + x] += few.sum[x];
      } else {
        const T* old = static_cast<const T*>(acc.data) + site * acc.ld;
        for (int64_t x = 0; x < count; ++x)
          change[x0 + x] += squared_change(frame + x * acc.c, old + x * acc.ld,
                                           p.out.truncation.inv_scale, acc.c);
      }
    }
  int64_t active = 0;
  for (int64_t x0 = 0; x0 < acc.w; x0 += p.block) {
    const int64_t x1 = x0 + p.block < acc.w ? x0 + p.block : acc.w;
    float total = 0.f;
    for (int64_t x = x0; x < x1; ++x) total += change[x];
    if (total <= t * t * static_cast<float>((y1 - y0) * (x1 - x0) * acc.c)) continue;
    active += (y1 - y0) * (x1 - x0);
    for (int64_t y = y0; y < y1; ++y)
      for (int64_t x = x0; x < x1; x += step) {
        const int64_t count = x + step < x1 ? step : x1 - x;
        const float* frame = frame_piece<S, T>(p, n, y, x, count, piece);
        write_run<T>(p.out, frame, (n * acc.h + y) * acc.w + x, count);
      }
  }
  return active;
}

template <class S, class T>
inline void encode_as(const EncodeParams& p) {
  const FeatureMap& acc = p.out.acc;
  const bool few_channels = acc.c <= kFewChannels;
  const bool blocks =
      p.block > 1 && p.out.truncation.policy == Policy::rms && *p.out.truncation.threshold > 0.f;
  const int64_t rows = blocks ? p.block : 1, strips = (acc.h + rows - 1) / rows;
  // 16 sites fill the cache lines of a planar frame.
  const int64_t step = few_channels || acc.c <= 64 ? kPiece : 16;
  int64_t total = 0;
  parallel_for(0, acc.n * strips, 1 + 16384 / (acc.w * acc.c * rows), [&](int64_t b, int64_t e) {
    float* change = scratch_of<float>(Scratch::rows, acc.w + padded(step * acc.c));
    float* piece = change + acc.w;
    FewChannels& few = *scratch_of<FewChannels>(Scratch::tile, 1);
    if (few_channels) fill_scale(p, few);
    int64_t active = 0;
    for (int64_t i = b; i < e; ++i) {
      const int64_t n = i / strips, y = i % strips * rows;
      if (blocks) {
        active += encode_blocks<S, T>(p, n, y, step, change, piece, few);
        continue;
      }
      for (int64_t x = 0; x < acc.w; x += step) {
        const int64_t count = x + step < acc.w ? step : acc.w - x;
        const int64_t site = (n * acc.h + y) * acc.w + x;
        const float* frame = frame_piece<S, T>(p, n, y, x, count, piece);
        active += few_channels ? encode_few<T>(p.out, frame, site, count, few)
                               : encode_wide<T>(p.out, frame, site, count);
      }
    }
    __atomic_fetch_add(&total, active, __ATOMIC_RELAXED);
  });
  p.out.counts[0] = acc.sites();
  p.out.counts[1] = total;
}

inline void encode(const EncodeParams& p) {
  const bool bf16 = p.out.acc.dtype == DType::bf16;
  if (p.dtype == DType::f32) return bf16 ? encode_as<float, BF16>(p) : encode_as<float, float>(p);
  return bf16 ? encode_as<BF16, BF16>(p) : encode_as<BF16, float>(p);
}
