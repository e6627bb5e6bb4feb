// affine, gather_channels and layer_norm: ops of one site each. Included by kernels.inl.

inline void affine(const AffineParams& p) {
  const FeatureMap& acc = p.out.acc;
  Candidates candidates(acc.n, acc.h, acc.w);
  candidates.add_sites(p.x.mask);
  update_candidates(p.out, p.act, candidates, 2 * acc.c, padded(acc.c),
                    [&](int32_t site, float* y, float* work) {
                      const float* x = site_row(p.x.map, site, work);
                      for_vectors(acc.c, [&](int64_t i, auto lanes) {
                        Vec v = load_lanes(x + i, lanes);
                        if (p.scale != nullptr) v *= load_lanes(p.scale + i, lanes);
                        if (p.shift != nullptr) v += load_lanes(p.shift + i, lanes);
                        store_lanes(y + i, v, lanes);
                      });
                    });
}

inline void gather_channels(const GatherParams& p) {
  const FeatureMap& acc = p.out.acc;
  Candidates candidates(acc.n, acc.h, acc.w);
  candidates.add_sites(p.x.mask);
  update_candidates(p.out, p.act, candidates, 2 * acc.c, padded(p.x.map.c),
                    [&](int32_t site, float* y, float* work) {
                      const float* x = site_row(p.x.map, site, work);
                      if (p.index == nullptr)
                        write_row(y, x, acc.c);
                      else
                        for (int64_t i = 0; i < acc.c; ++i) y[i] = x[p.index[i]];
                    });
}

// In two passes: the difference of moments would cancel where the mean is large. The second pass
// also gives by how much the first one's mean was rounded, which is taken off as well.
inline void layer_norm(const LayerNormParams& p) {
  const FeatureMap& acc = p.out.acc;
  const float inv_c = 1.f / static_cast<float>(acc.c);
  Candidates candidates(acc.n, acc.h, acc.w);
  candidates.add_sites(p.x.mask);
  update_candidates(
      p.out, p.act, candidates, 2 * acc.c, padded(acc.c), [&](int32_t site, float* y, float* work) {
        const float* x = site_row(p.x.map, site, work);
        Vec sum = {}, rest = {}, squares = {};
        for_vectors(acc.c, [&](int64_t i, auto lanes) { sum += load_lanes(x + i, lanes); });
        const float mean = sum_of(sum) * inv_c;
        for_vectors(acc.c, [&](int64_t i, auto lanes) {
          const Vec d = only_lanes(load_lanes(x + i, lanes) - mean, lanes);
          rest += d;
          squares += d * d;
        });
        const float shift = sum_of(rest) * inv_c;
        const float variance = sum_of(squares) * inv_c - shift * shift;
        const float rstd = 1.f / sqrtf(variance + p.eps);
        for_vectors(acc.c, [&](int64_t i, auto lanes) {
          Vec v = (load_lanes(x + i, lanes) - mean - shift) * rstd;
          if (p.weight != nullptr) v *= load_lanes(p.weight + i, lanes);
          if (p.bias != nullptr) v += load_lanes(p.bias + i, lanes);
          store_lanes(y + i, v, lanes);
        });
      });
}
