// pool2d, adaptive_pool2d and global_pool2d. Included by kernels.inl.

// X is the input's type. A maximum keeps the first NaN it meets, as torch does.
template <class X>
inline void pool_as(const PoolParams& p, Candidates& candidates) {
  const FeatureMap &acc = p.out.acc, &in = p.x.map;
  const int64_t row_step = p.y.step * in.w * in.ld, step = p.x_axis.step * in.ld;
  const int64_t taps = p.maximum || p.window_y.kernel > 0 ? 4 : 16;
  update_candidates(p.out, p.act, candidates, taps * acc.c, 0, [&](int32_t site, float* y, float*) {
    const Position at = position_of(acc, site);
    const int64_t y0 = p.y.begin[at.y], y1 = p.y.end[at.y];
    const int64_t x0 = p.x_axis.begin[at.x], x1 = p.x_axis.end[at.x];
    const X* corner = static_cast<const X*>(in.data) + ((at.n * in.h + y0) * in.w + x0) * in.ld;
    const auto reduce = [&](Vec start, auto combine, auto finish) {
      for_vectors(acc.c, [&](int64_t i, auto lanes) {
        Vec total = start;
        const X* row = corner + i;
        for (int64_t iy = y0; iy < y1; iy += p.y.step, row += row_step) {
          const X* tap = row;
          for (int64_t ix = x0; ix < x1; ix += p.x_axis.step, tap += step)
            total = combine(total, load_lanes(tap, lanes));
        }
        store_lanes(y + i, finish(total), lanes);
      });
    };
    if (p.maximum) {
      reduce(
          splat(-__builtin_inff()),
          [](Vec best, Vec v) { return select((v > best) | (v != v), v, best); },
          [](Vec best) { return best; });
    } else {
      const bool empty = y0 >= y1 || x0 >= x1;
      const float divisor =
          empty ? 1.f : static_cast<float>(p.y.divisor[at.y] * p.x_axis.divisor[at.x]);
      reduce(Vec{}, [](Vec sum, Vec v) { return sum + v; }, [=](Vec sum) { return sum / divisor; });
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
