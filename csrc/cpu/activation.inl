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

// p[0] + p[1] v + p[2] v^2 + ...
template <int N>
DELTAFX_INLINE Vec polynomial(const float (&p)[N], Vec v) {
  Vec y = splat(p[N - 1]);
  for (int i = N - 2; i >= 0; --i) y = y * v + p[i];
  return y;
}

// The polynomials below are minimax fits of their function's relative error, save that of erf
// beyond 1, where the absolute error counts; each is good to less than half an ulp of the result.

// log(1 + e^v), as max(v, 0) + log1p(e^-|v|), with log1p(e) = 2 atanh(e / (2 + e)).
DELTAFX_INLINE Vec softplus_of(Vec v) {
  static constexpr float atanh[] = {3.333315849e-1f, 2.001245469e-1f, 1.398030370e-1f,
                                    1.408915669e-1f};  // from the cubic term on
  const Vec e = exp_of(-abs_of(v));
  const Vec s = e / (2.f + e), z = s * s;
  const Vec log1p_e = (s + s) + (s + s) * z * polynomial(atanh, z);
  return max_of(Vec{}, v) + log1p_e;
}

// erf, odd below 1; beyond, 1 - e^(-v^2) times a polynomial, up to 4, where it rounds to 1.
DELTAFX_INLINE Vec erf_of(Vec v) {
  static constexpr float near[] = {1.128379107e+0f,  -3.761262596e-1f, 1.128358543e-1f,
                                   -2.685381100e-2f, 5.188327283e-3f,  -8.010191377e-4f,
                                   7.853853458e-5f};
  static constexpr float far[] = {2.108064145e-1f,  -7.437047362e-2f, 2.489706129e-2f,
                                  -7.943582721e-3f, 2.586486749e-3f,  -7.593780756e-4f,
                                  1.110576632e-4f,  -6.761803525e-5f, 4.340618034e-5f};
  const Vec x = min_of(splat(4.f), abs_of(v));
  const Vec beyond = 1.f - exp_of(-x * x) * polynomial(far, x - 2.5f);
  return select(x > 1.f, select(v < 0.f, -beyond, beyond), v * polynomial(near, v * v));
}

// e^v - 1 for v <= 0.
DELTAFX_INLINE Vec expm1_of(Vec v) {
  static constexpr float near[] = {5.000000596e-1f, 1.666666418e-1f, 4.166536033e-2f,
                                   8.333578706e-3f, 1.399617875e-3f, 1.984980336e-4f};
  return select(v < -0.5f, exp_of(v) - 1.f, v + v * v * polynomial(near, v));
}

// v tanh(log(1 + e^v)) = v n / (n + 2) with n = e^v (e^v + 2); 1 within rounding from 20 on.
DELTAFX_INLINE Vec mish_of(Vec v) {
  const Vec e = exp_of(min_of(splat(20.f), v));
  const Vec n = e * (e + 2.f);
  return v * (n / (n + 2.f));
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
      return map_row(row, c, [=](Vec v, int64_t) { return min_of(splat(b), max_of(splat(a), v)); });
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
      return map_row(
          row, c, [](Vec v, int64_t) { return min_of(splat(6.f), max_of(Vec{}, v + 3.f)) / 6.f; });
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
        return select(v > 0.f, v * b, expm1_of(v * s) * (a * b));
      });
    case Act::mish:
      return map_row(row, c, [](Vec v, int64_t) { return mish_of(v); });
    case Act::softplus:
      return map_row(row, c,
                     [=](Vec v, int64_t) { return select(v * a > b, v, softplus_of(v * a) / a); });
  }
}
