// resize2d and pad2d. Included by kernels.inl.

inline void add_resize(Candidates& candidates, const ResizeParams& p) {
  const FeatureMap& acc = p.out.acc;
  int32_t* y1 = scratch_of<int32_t>(Scratch::flags, acc.h + acc.w);
  int32_t* x1 = y1 + acc.h;
  for (int64_t y = 0; y < acc.h; ++y) y1[y] = p.y.last[y] + 1;
  for (int64_t x = 0; x < acc.w; ++x) x1[x] = p.x_axis.last[x] + 1;
  candidates.add_ranges(p.x.mask, p.y.first, y1, p.x_axis.first, x1);
}

template <class X>
inline void resize_as(const ResizeParams& p, Candidates& candidates) {
  const FeatureMap &acc = p.out.acc, &in = p.x.map;
  update_candidates(p.out, p.act, candidates, 3 * acc.c, 0, [&](int32_t site, float* y, float*) {
    const Position at = position_of(acc, site);
    const X* stream = static_cast<const X*>(in.data) + at.n * in.h * in.w * in.ld;
    const X* row0 = stream + p.y.first[at.y] * in.w * in.ld;
    const int64_t left = p.x_axis.first[at.x] * in.ld;
    if (!p.linear) {
      for_vectors(acc.c, [&](int64_t i, auto lanes) {
        store_lanes(y + i, load_lanes(row0 + left + i, lanes), lanes);
      });
      return;
    }
    const X* row1 = stream + p.y.last[at.y] * in.w * in.ld;
    const int64_t right = p.x_axis.last[at.x] * in.ld;
    const float ly = p.y.lambda[at.y], lx = p.x_axis.lambda[at.x], my = 1.f - ly, mx = 1.f - lx;
    for_vectors(acc.c, [&](int64_t i, auto lanes) {
      const Vec top =
          load_lanes(row0 + left + i, lanes) * mx + load_lanes(row0 + right + i, lanes) * lx;
      const Vec bottom =
          load_lanes(row1 + left + i, lanes) * mx + load_lanes(row1 + right + i, lanes) * lx;
      store_lanes(y + i, top * my + bottom * ly, lanes);
    });
  });
}

inline void resize2d(const ResizeParams& p) {
  Candidates candidates(p.out.acc.n, p.out.acc.h, p.out.acc.w);
  add_resize(candidates, p);
  if (p.x.map.dtype == DType::bf16)
    resize_as<BF16>(p, candidates);
  else
    resize_as<float>(p, candidates);
}

inline void pad2d(const PadParams& p) {
  const FeatureMap &acc = p.out.acc, &in = p.x.map;
  Candidates candidates(acc.n, acc.h, acc.w);
  // A 1x1 window at stride 1 whose padding shifts the coordinates; out of range it finds nothing.
  candidates.add_windows(p.x.mask, {1, 1, p.top, 1}, {1, 1, p.left, 1});
  const auto clamp = [](int64_t v, int64_t high) { return v < 0 ? 0 : v > high ? high : v; };
  const int64_t y0 = clamp(p.top, acc.h), y1 = clamp(p.top + in.h, acc.h);
  const int64_t x0 = clamp(p.left, acc.w), x1 = clamp(p.left + in.w, acc.w);
  add_lost(candidates, acc, 0, y0, 0, acc.w);
  add_lost(candidates, acc, y1, acc.h, 0, acc.w);
  add_lost(candidates, acc, y0, y1, 0, x0);
  add_lost(candidates, acc, y0, y1, x1, acc.w);
  const Activation none{Act::identity, {}, nullptr};
  update_candidates(
      p.out, none, candidates, 2 * acc.c, padded(acc.c), [&](int32_t site, float* y, float* work) {
        const Position at = position_of(acc, site);
        const int64_t iy = at.y - p.top, ix = at.x - p.left;
        if (iy < 0 || iy >= in.h || ix < 0 || ix >= in.w) {
          for_vectors(acc.c,
                      [&](int64_t i, auto lanes) { store_lanes(y + i, splat(p.value), lanes); });
          return;
        }
        const float* x = site_row(in, (at.n * in.h + iy) * in.w + ix, work);
        write_row(y, x, acc.c);
      });
}
