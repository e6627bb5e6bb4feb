// Plain descriptions of what a delta op works on: no ATen, so that CPU kernels and CUDA kernels
// share them and compile quickly. csrc/common/checks.h makes them from tensors.
#pragma once

#include <cstdint>

namespace deltafx {

enum class DType : int { f32, bf16, f16 };

// A channels_last feature map, or a slice of the channels of a wider one: site (n, y, x) starts at
// data + ((n * h + y) * w + x) * ld elements, its c channels are contiguous, and ld >= c.
struct FeatureMap {
  void* data;
  DType dtype;
  int64_t n, c, h, w, ld;
  int64_t sites() const { return n * h * w; }
};

// One byte a site, [n, h, w] contiguous, 0 or 1. Cleared once a frame by the executor; ops only
// ever set bytes, because the producers of one concatenated buffer share a mask.
struct Mask {
  uint8_t* data;
  int64_t n, h, w;
  int64_t sites() const { return n * h * w; }
};

enum class Act : int {
  identity,
  relu,
  relu6,
  hardtanh,    // params: lower, upper
  leaky_relu,  // params: slope
  prelu,       // weight: slope per channel
  silu,
  hardswish,
  hardsigmoid,
  sigmoid,
  tanh,
  gelu,       // erf form
  gelu_tanh,  // tanh form
  elu,        // params: alpha, scale, input_scale
  mish,
  softplus,  // params: beta, threshold
};

struct Activation {
  Act kind;
  float p[3];
  const float* weight;  // per channel, or null
};

enum class Policy : int { none, rms, maximum };

// Channels are compared in groups of this many, whatever a kernel's tile is, so that results do
// not depend on the machine.
constexpr int64_t kTruncationGroup = 64;

// none: every candidate is written. Otherwise a group of channels is written unless its change,
// the policy's norm of (y - acc) * inv_scale[c], is within *threshold. A threshold of 0 compares
// exactly (inv_scale plays no part), so that no change is lost to underflow.
struct Truncation {
  Policy policy;
  const float* inv_scale;
  const float* threshold;
};

// What every delta op writes. counts[0] is the number of candidates, and on the CPU counts[1] the
// number of sites this op made active, both of this frame; they are cleared with the masks, and
// count up from 0. On CUDA the mask tells what is active, for every kernel would wait for that
// count at its end; counts[1] is how many blocks of a kernel that makes the op's list are done.
struct Output {
  FeatureMap acc;
  Mask mask;
  int64_t* counts;
  Truncation truncation;
};

// The window of an output coordinate o along one axis: input coordinates
// o * stride - pad + k * dilation for k in [0, kernel), those inside [0, in) only.
struct Window {
  int64_t kernel, stride, pad, dilation;
};

}  // namespace deltafx
