// Activations over a vector of channels in fp32, as torch defines them. A NaN stays a NaN.
#pragma once

#include "cuda/device.cuh"

namespace deltafx::cuda {

// A NaN on either side is one in the result.
__device__ __forceinline__ float max_of(float a, float b) {
#if __CUDA_ARCH__ >= 800
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(a) : "f"(a), "f"(b));
  return a;
#else
  return a > b || a != a ? a : b;
#endif
}
__device__ __forceinline__ float clamp_of(float v, float low, float high) {
  return v < low ? low : v > high ? high : v;
}
__device__ __forceinline__ float softplus_of(float v) {
  return fmaxf(v, 0.f) + log1pf(expf(-fabsf(v))) + (v != v ? v : 0.f);
}

template <class F>
__device__ __forceinline__ void map_vector(float (&v)[kVector], const F& f) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) v[i] = f(v[i]);
}

// The rarer activations, out of line so that they cost the kernels no registers.
static __device__ __noinline__ float costly_activation(Act kind, float a, float b, float s,
                                                       float v) {
  switch (kind) {
    case Act::tanh:
      return tanhf(v);
    case Act::gelu:
      return v * 0.5f * (1.f + erff(v * 0.70710678118654752f));
    case Act::gelu_tanh:
      return v * 0.5f * (1.f + tanhf((v + v * v * v * 0.044715f) * 0.79788456080286536f));
    case Act::elu:
      return v > 0.f ? v * b : expm1f(v * s) * (a * b);
    case Act::mish:
      return v * tanhf(softplus_of(v));
    case Act::softplus:
      return v * a > b ? v : softplus_of(v * a) / a;
    default:
      return v;
  }
}

// Applies the activation to channels [c0, c0 + count) in v.
__device__ __forceinline__ void activate(const Activation& act, int c0, int count,
                                         float (&v)[kVector]) {
  const float a = act.p[0], b = act.p[1];
  switch (act.kind) {
    case Act::identity:
      return;
    case Act::relu:
      return map_vector(v, [](float x) { return x < 0.f ? 0.f : x; });
    case Act::relu6:
      return map_vector(v, [](float x) { return clamp_of(x, 0.f, 6.f); });
    case Act::hardtanh:
      return map_vector(v, [=](float x) { return clamp_of(x, a, b); });
    case Act::leaky_relu:
      return map_vector(v, [=](float x) { return x > 0.f ? x : x * a; });
    case Act::hardswish:
      return map_vector(v, [](float x) { return x * clamp_of(x + 3.f, 0.f, 6.f) / 6.f; });
    case Act::hardsigmoid:
      return map_vector(v, [](float x) { return clamp_of(x + 3.f, 0.f, 6.f) / 6.f; });
    case Act::silu:
      return map_vector(v, [](float x) { return x / (1.f + expf(-x)); });
    case Act::sigmoid:
      return map_vector(v, [](float x) { return 1.f / (1.f + expf(-x)); });
    case Act::prelu:
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        if (i < count && !(v[i] > 0.f)) v[i] *= act.weight[c0 + i];
      return;
    default:
      return map_vector(v, [&](float x) { return costly_activation(act.kind, a, b, act.p[2], x); });
  }
}

// The same out of line, for kernels whose own code must stay small.
static __device__ __noinline__ void activate_out_of_line(const Activation& act, int c0, int count,
                                                         float (&v)[kVector]) {
  activate(act, c0, count, v);
}
__device__ __forceinline__ void activate_any(const Activation& act, int c0, int count,
                                             float (&v)[kVector]) {
  float copy[kVector];  // the call wants memory, which v itself is better without
#pragma unroll
  for (int i = 0; i < kVector; ++i) copy[i] = v[i];
  activate_out_of_line(act, c0, count, copy);
#pragma unroll
  for (int i = 0; i < kVector; ++i) v[i] = copy[i];
}

// An activation that is a clamp, or the call for the others.
struct FastActivation {
  bool is_clamp;
  float low, high;

  __device__ explicit FastActivation(const Activation& act)
      : is_clamp(act.kind == Act::identity || act.kind == Act::relu || act.kind == Act::relu6 ||
                 act.kind == Act::hardtanh),
        low(act.kind == Act::identity   ? -INFINITY
            : act.kind == Act::hardtanh ? act.p[0]
                                        : 0.f),
        high(act.kind == Act::relu6      ? 6.f
             : act.kind == Act::hardtanh ? act.p[1]
                                         : INFINITY) {}

  __device__ void apply(const Activation& act, int c0, int count, float (&v)[kVector]) const {
    if (!is_clamp) return activate_any(act, c0, count, v);
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = clamp(v[i]);
  }
  __device__ __forceinline__ float clamp(float v) const { return nan_min(max_of(v, low), high); }

 private:
  // A NaN stays one, as it does in torch and does not in fmaxf.
  static __device__ float nan_min(float a, float b) {
#if __CUDA_ARCH__ >= 800
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(a) : "f"(a), "f"(b));
    return a;
#else
    return a > b ? b : a;
#endif
  }
};

// Of whole vectors for results in half precision, for which the intrinsics are exact enough (2
// units in the last place of an fp32).
__device__ __forceinline__ void apply_in_half(const FastActivation& fast, const Activation& act,
                                              int c0, float (&v)[kVector]) {
  if (act.kind == Act::silu)
    map_vector(v, [](float x) { return __fdividef(x, 1.f + __expf(-x)); });
  else
    fast.apply(act, c0, kVector, v);
}

}  // namespace deltafx::cuda
