// Activations over fp32 vectors, matching torch's definitions. Included by kernels.inl.

DELTAFX_INLINE Vec sigmoid_of(Vec v) { return 1.f / (1.f + exp_of(-v)); }

// tanh without cancellation near 0: x * P(x^2) for |x| < 0.625 (Cephes' tanhf), else by exp.
DELTAFX_INLINE Vec tanh_of(Vec v) {
  const Vec z = v * v;
  Vec p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const Vec near = p * z * v + v;
  const Vec magnitude = abs_of(v);
  const Vec far = 1.f - 2.f / (exp_of(magnitude + magnitude) + 1.f);
  return select(magnitude > 0.625f, select(v < 0.f, -far, far), near);
}

// log(1 + e^v), as max(v, 0) + log1p(e^-|v|).
inline Vec softplus_of(Vec v) {
  const Vec e = exp_of(-abs_of(v));
  Vec log1p_e;
  for (int i = 0; i < kLanes; ++i) log1p_e[i] = log1pf(e[i]);
  return max_of(Vec{}, v) + log1p_e;
}

inline Vec erf_of(Vec v) {
  for (int i = 0; i < kLanes; ++i) v[i] = erff(v[i]);
  return v;
}

template <class F>
DELTAFX_INLINE void map_row(float* row, int64_t c, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= c; i += kLanes) store(row + i, f(load(row + i), i));
  if (i < c) store_some(row + i, f(load_some(row + i, c - i), i), c - i);
}

// Applies the activation in place to channels [first, first + c) of a site, held in row[0..c).
inline void activate(const Activation& act, float* row, int64_t first, int64_t c) {
  const float a = act.p[0], b = act.p[1], s = act.p[2];
  switch (act.kind) {
    case Act::identity:
      return;
    case Act::relu:
      return map_row(row, c, [](Vec v, int64_t) { return max_of(Vec{}, v); });
    case Act::relu6:
      return map_row(row, c, [](Vec v, int64_t) { return min_of(splat(6.f), max_of(Vec{}, v)); });
    case Act::hardtanh:
      return map_row(row, c,
                     [=](Vec v, int64_t) { return min_of(splat(b), max_of(splat(a), v)); });
    case Act::leaky_relu:
      return map_row(row, c, [=](Vec v, int64_t) { return select(v > 0.f, v, v * a); });
    case Act::prelu: {
      const float* w = act.weight + first;
      return map_row(row, c, [=](Vec v, int64_t i) {
        const Vec slope = i + kLanes <= c ? load(w + i) : load_some(w + i, c - i);
        return select(v > 0.f, v, v * slope);
      });
    }
    case Act::silu:
      return map_row(row, c, [](Vec v, int64_t) { return v / (1.f + exp_of(-v)); });
    case Act::hardswish:
      return map_row(row, c, [](Vec v, int64_t) {
        return v * min_of(splat(6.f), max_of(Vec{}, v + 3.f)) / 6.f;
      });
    case Act::hardsigmoid:
      return map_row(row, c, [](Vec v, int64_t) {
        return min_of(splat(6.f), max_of(Vec{}, v + 3.f)) / 6.f;
      });
    case Act::sigmoid:
      return map_row(row, c, [](Vec v, int64_t) { return sigmoid_of(v); });
    case Act::tanh:
      return map_row(row, c, [](Vec v, int64_t) { return tanh_of(v); });
    case Act::gelu:
      return map_row(row, c, [](Vec v, int64_t) {
        return v * 0.5f * (1.f + erf_of(v * 0.70710678118654752f));
      });
    case Act::gelu_tanh:
      return map_row(row, c, [](Vec v, int64_t) {
        const Vec inner = (v + v * v * v * 0.044715f) * 0.79788456080286536f;
        return v * 0.5f * (1.f + tanh_of(inner));
      });
    case Act::elu:
      return map_row(row, c, [=](Vec v, int64_t) {
        Vec negative;
        for (int i = 0; i < kLanes; ++i) negative[i] = expm1f(v[i] * s);
        return select(v > 0.f, v * b, negative * (a * b));
      });
    case Act::mish:
      return map_row(row, c, [](Vec v, int64_t) { return v * tanh_of(softplus_of(v)); });
    case Act::softplus:
      return map_row(row, c,
                     [=](Vec v, int64_t) { return select(v * a > b, v, softplus_of(v * a) / a); });
  }
}
