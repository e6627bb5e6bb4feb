// pool2d, adaptive_pool2d and global_pool2d. Included by kernels.inl.

// The taps of one site's window: `rows` rows of `columns`, both steps in elements.
template <class X>
struct Taps {
  const X* first;
  int64_t rows, columns, row_step, step;
};

// y[0..K vectors) = finish of the taps' channels, combined in order from `start`. Several vectors
// at a time, as the loops over a small window cost more than its additions.
template <int K, class X, class Lanes, class Combine, class Finish>
DELTAFX_INLINE void reduce_taps(const Taps<X>& taps, int64_t i, Lanes lanes, Vec start,
                                const Combine& combine, const Finish& finish, float* y) {
  Vec total[K];
  for (int k = 0; k < K; ++k) total[k] = start;
  const X* row = taps.first + i;
  for (int64_t r = 0; r < taps.rows; ++r, row += taps.row_step) {
    const X* tap = row;
    for (int64_t t = 0; t < taps.columns; ++t, tap += taps.step)
      for (int k = 0; k < K; ++k) total[k] = combine(total[k], load_lanes(tap + k * kLanes, lanes));
  }
  for (int k = 0; k < K; ++k) store_lanes(y + i + k * kLanes, finish(total[k]), lanes);
}

template <class X, class Combine, class Finish>
DELTAFX_INLINE void reduce_window(const Taps<X>& taps, int64_t c, Vec start, const Combine& combine,
                                  const Finish& finish, float* y) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= c; i += 4 * kLanes)
    reduce_taps<4>(taps, i, AllLanes{}, start, combine, finish, y);
  for_vectors(c - i, [&](int64_t k, auto lanes) {
    reduce_taps<1>(taps, i + k, lanes, start, combine, finish, y);
  });
}

// How many inputs from begin to end, every step.
DELTAFX_INLINE int64_t count_of(const PoolAxis& axis, int64_t o) {
  const int64_t size = axis.end[o] - axis.begin[o];
  return size <= 0 ? 0 : axis.step == 1 ? size : (size + axis.step - 1) / axis.step;
}

// X is the input's type. A maximum keeps the first NaN it meets, as torch does.
template <class X>
inline void pool_as(const PoolParams& p, Candidates& candidates) {
  const FeatureMap &acc = p.out.acc, &in = p.x.map;
  update_candidates(p.out, p.act, candidates, 4 * acc.c, 0, [&](int32_t site, float* y, float*) {
    const Position at = position_of(acc, site);
    const int64_t first = (at.n * in.h + p.y.begin[at.y]) * in.w + p.x_axis.begin[at.x];
    const Taps<X> taps{static_cast<const X*>(in.data) + first * in.ld, count_of(p.y, at.y),
                       count_of(p.x_axis, at.x), p.y.step * in.w * in.ld, p.x_axis.step * in.ld};
    if (p.maximum) {
      reduce_window(
          taps, acc.c, splat(-__builtin_inff()),
          [](Vec best, Vec v) { return select((v > best) | (v != v), v, best); },
          [](Vec best) { return best; }, y);
    } else {
      // A window with no taps holds 0.
      const float divisor = taps.rows * taps.columns == 0
                                ? 1.f
                                : static_cast<float>(p.y.divisor[at.y] * p.x_axis.divisor[at.x]);
      reduce_window(
          taps, acc.c, Vec{}, [](Vec sum, Vec v) { return sum + v; },
          [=](Vec sum) { return sum / divisor; }, y);
    }
  });
}

inline void pool2d(const PoolParams& p) {
  const FeatureMap& acc = p.out.acc;
  Candidates candidates(acc.n, acc.h, acc.w);
  if (p.window_y.kernel > 0) {
    candidates.add_windows(p.x.mask, p.window_y, p.window_x);
    // Where padding and ceil_mode meet, windows may lie outside the input altogether.
    for (int64_t y = 0; y < acc.h; ++y)
      if (p.y.begin[y] >= p.y.end[y]) add_lost(candidates, acc, y, y + 1, 0, acc.w);
    for (int64_t x = 0; x < acc.w; ++x)
      if (p.x_axis.begin[x] >= p.x_axis.end[x]) add_lost(candidates, acc, 0, acc.h, x, x + 1);
  } else {
    candidates.add_ranges(p.x.mask, p.y.begin, p.y.end, p.x_axis.begin, p.x_axis.end);
  }
  if (p.x.map.dtype == DType::bf16)
    pool_as<BF16>(p, candidates);
  else
    pool_as<float>(p, candidates);
}

// dst[i..] = the sums over `count` sites of K vectors of channels. In runs of 16 sites: the
// rounding errors then grow with 16 + count / 16 instead of count.
template <int K, class X, class Lanes>
DELTAFX_INLINE void sum_vectors(const X* first, int64_t ld, int64_t count, Lanes lanes,
                                float* dst) {
  Vec total[K] = {};
  for (int64_t s = 0; s < count; s += 16) {
    Vec run[K] = {};
    const int64_t end = s + 16 < count ? s + 16 : count;
    for (int64_t site = s; site < end; ++site)
      for (int k = 0; k < K; ++k) run[k] += load_lanes(first + site * ld + k * kLanes, lanes);
    for (int k = 0; k < K; ++k) total[k] += run[k];
  }
  for (int k = 0; k < K; ++k) store_lanes(dst + k * kLanes, total[k], lanes);
}

// dst[c] = the sum of `count` sites of `map` from `site`.
template <class X>
inline void sum_sites(const FeatureMap& map, int64_t site, int64_t count, float* dst) {
  const X* first = static_cast<const X*>(map.data) + site * map.ld;
  int64_t i = 0;
  for (; i + 4 * kLanes <= map.c; i += 4 * kLanes)
    sum_vectors<4>(first + i, map.ld, count, AllLanes{}, dst + i);
  for_vectors(map.c - i, [&](int64_t k, auto lanes) {
    sum_vectors<1>(first + i + k, map.ld, count, lanes, dst + i + k);
  });
}

inline void global_pool2d(const GlobalPoolParams& p) {
  const FeatureMap& in = p.x.map;
  const int64_t sites = in.h * in.w, tiles = (sites + kPoolTile - 1) / kPoolTile;
  Candidates candidates(in.n, 1, 1);
  candidates.add_streams(p.x.mask);
  const int32_t* list = candidates.list();
  parallel_for(0, candidates.size() * tiles, 1 + 32768 / (kPoolTile * in.c),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t n = list[i / tiles], tile = i % tiles,
                                 first = n * sites + tile * kPoolTile;
                   const int64_t count = tile + 1 < tiles ? kPoolTile : sites - tile * kPoolTile;
                   if (!any(p.x.mask.data + first, count)) continue;
                   float* dst = p.partial + (n * tiles + tile) * in.c;
                   if (in.dtype == DType::bf16)
                     sum_sites<BF16>(in, first, count, dst);
                   else
                     sum_sites<float>(in, first, count, dst);
                 }
               });
  FeatureMap partial{p.partial, DType::f32, in.n, in.c, tiles, 1, in.c};
  update_candidates(p.out, p.act, candidates, tiles * in.c, 0, [&](int32_t n, float* y, float*) {
    sum_sites<float>(partial, n * tiles, tiles, y);
    const float divisor = static_cast<float>(sites);
    map_row(y, in.c, [=](Vec v, int64_t) { return v / divisor; });
  });
}
