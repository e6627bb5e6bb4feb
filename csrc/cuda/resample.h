// What an output coordinate of a pool or a resize reads along one axis, as rules rather than
// tables: torch's, evaluated on the device. They must round as csrc/ops does when it makes the
// tables.
#pragma once

#include <cstdint>

namespace deltafx::cuda {

struct PoolRule {
  int in, out;
  int kernel, stride, pad, dilation;  // kernel 0: adaptive
  bool count_include_pad;
  int divisor;  // 0: the window's own
};

enum class Sampling : int { nearest, nearest_exact, linear, linear_corners };

struct ResizeRule {
  int in, out;
  Sampling sampling;
  float step;  // input coordinates per output coordinate
};

}  // namespace deltafx::cuda
