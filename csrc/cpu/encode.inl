// encode: a dense tensor (the frame, or a dense op's result) against its accumulator.
// Included by kernels.inl. S is the frame's type, T the accumulator's.

// Row [x0, x0 + count) of the frame at (n, y) as [count][c] fp32, channels innermost.
template <class S>
inline void read_row(const EncodeParams& p, int64_t n, int64_t y, int64_t x0, int64_t count,
                     float* row) {
  const int64_t c = p.out.acc.c;
  const S* base = static_cast<const S*>(p.x) + n * p.stride_n + y * p.stride_h + x0 * p.stride_w;
  if (p.stride_c == 1) {
    for (int64_t x = 0; x < count; ++x) {
      const S* src = base + x * p.stride_w;
      int64_t k = 0;
      for (; k + kLanes <= c; k += kLanes) store(row + x * c + k, load(src + k));
      for (; k < c; ++k) row[x * c + k] = to_float(src[k]);
    }
    return;
  }
  for (int64_t k = 0; k < c; ++k) {
    const S* src = base + k * p.stride_c;
    for (int64_t x = 0; x < count; ++x) row[x * c + k] = to_float(src[x * p.stride_w]);
  }
}

// Sum over the channels of a site of the scaled squared change; NaN where anything is NaN.
template <class T>
inline float squared_change(const float* y, const T* acc, const float* inv_scale, int64_t c) {
  float total = 0.f;
  for (int64_t k = 0; k < c; ++k) {
    const float d = (y[k] - to_float(acc[k])) * inv_scale[k];
    total += d * d;
  }
  return total;
}

// Gates block x block squares by their RMS: the whole square is written, or none of it.
template <class S, class T>
inline int64_t encode_blocks(const EncodeParams& p, int64_t n, int64_t y0) {
  const FeatureMap& acc = p.out.acc;
  const int64_t y1 = y0 + p.block < acc.h ? y0 + p.block : acc.h;
  const int64_t blocks = (acc.w + p.block - 1) / p.block;
  const float t = *p.out.truncation.threshold;
  float* rows = scratch_of<float>(Scratch::rows, (y1 - y0) * acc.w * acc.c + blocks);
  float* change = rows + (y1 - y0) * acc.w * acc.c;
  for (int64_t b = 0; b < blocks; ++b) change[b] = 0.f;
  for (int64_t y = y0; y < y1; ++y) {
    float* row = rows + (y - y0) * acc.w * acc.c;
    read_row<S>(p, n, y, 0, acc.w, row);
    round_row(row, acc.w * acc.c, static_cast<const T*>(nullptr));
    const T* old = static_cast<const T*>(acc.data) + (n * acc.h + y) * acc.w * acc.ld;
    for (int64_t x = 0; x < acc.w; ++x)
      change[x / p.block] += squared_change(row + x * acc.c, old + x * acc.ld,
                                            p.out.truncation.inv_scale, acc.c);
  }
  int64_t count = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t x0 = b * p.block, x1 = x0 + p.block < acc.w ? x0 + p.block : acc.w;
    const float elements = static_cast<float>((y1 - y0) * (x1 - x0) * acc.c);
    if (change[b] <= t * t * elements) continue;
    for (int64_t y = y0; y < y1; ++y)
      for (int64_t x = x0; x < x1; ++x) {
        const int64_t site = (n * acc.h + y) * acc.w + x;
        write_row(static_cast<T*>(acc.data) + site * acc.ld,
                  rows + ((y - y0) * acc.w + x) * acc.c, acc.c);
        p.out.mask.data[site] = 1;
        ++count;
      }
  }
  return count;
}

// Gates every site of a row by itself, in truncation groups of channels.
template <class S, class T>
inline int64_t encode_row(const EncodeParams& p, int64_t n, int64_t y) {
  const FeatureMap& acc = p.out.acc;
  const Activation none{Act::identity, {}, nullptr};
  float* row = scratch_of<float>(Scratch::rows, acc.w * acc.c);
  read_row<S>(p, n, y, 0, acc.w, row);
  int64_t count = 0;
  for (int64_t x = 0; x < acc.w; ++x) {
    const int64_t site = (n * acc.h + y) * acc.w + x;
    const bool active = update_site<T>(p.out, none, row + x * acc.c, site);
    p.out.mask.data[site] |= static_cast<uint8_t>(active);
    count += active;
  }
  return count;
}

template <class S, class T>
inline void encode_as(const EncodeParams& p) {
  const FeatureMap& acc = p.out.acc;
  const bool blocks = p.block > 1 && p.out.truncation.policy == Policy::rms &&
                      *p.out.truncation.threshold > 0.f;
  const int64_t step = blocks ? p.block : 1;
  const int64_t strips = (acc.h + step - 1) / step;
  int64_t total = 0;
  parallel_for(0, acc.n * strips, 1 + 16384 / (acc.w * acc.c * step), [&](int64_t b, int64_t e) {
    int64_t count = 0;
    for (int64_t i = b; i < e; ++i) {
      const int64_t n = i / strips, y = i % strips * step;
      count += blocks ? encode_blocks<S, T>(p, n, y) : encode_row<S, T>(p, n, y);
    }
    __atomic_fetch_add(&total, count, __ATOMIC_RELAXED);
  });
  p.out.counts[0] = acc.sites();
  p.out.counts[1] = total;
}

inline void encode(const EncodeParams& p) {
  const bool bf16 = p.out.acc.dtype == DType::bf16;
  if (p.dtype == DType::f32) return bf16 ? encode_as<float, BF16>(p) : encode_as<float, float>(p);
  return bf16 ? encode_as<BF16, BF16>(p) : encode_as<BF16, float>(p);
}
