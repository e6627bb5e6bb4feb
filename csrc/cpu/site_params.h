// Parameters of the delta ops that compute each candidate by itself (all but encode and the
// convolutions), as csrc/ops hands them to the kernels.
#pragma once

#include "common/types.h"

namespace deltafx {

// An accumulator that is read, with the sites of it that are active in this frame.
struct Input {
  FeatureMap map;
  Mask mask;
};

// y[c] = x[c] * scale[c] + shift[c]; either may be null.
struct AffineParams {
  Output out;
  Activation act;
  Input x;
  const float* scale;
  const float* shift;
};

// y[c] = x[index[c]]; all of x in order where index is null.
struct GatherParams {
  Output out;
  Activation act;
  Input x;
  const int64_t* index;
};

// Normalizes the channels of a site; weight and bias may be null.
struct LayerNormParams {
  Output out;
  Activation act;
  Input x;
  const float* weight;
  const float* bias;
  float eps;
};

enum class BinaryOp : int { add, sub, mul, div, max };

// Element (n, site of the stream, c) lies at data + n * stride_n + site * stride_site + c *
// stride_c, in elements. A broadcast axis has stride 0.
struct Operand {
  const void* data;
  DType dtype;
  int64_t stride_n, stride_site, stride_c;
  // Null data: a constant. [n, h, w] like the output, or [n or 1, 1, 1] for a gate.
  Mask mask;
};

struct BinaryParams {
  Output out;
  Activation act;
  Operand a, b;
  BinaryOp op;
};

// Sites outside x (which starts at (top, left), negative to crop) hold `value`.
struct PadParams {
  Output out;
  Input x;
  int64_t top, left;
  float value;
};

// What an output coordinate o of a pool reads along one axis: begin[o], begin[o] + step, ... up to
// but excluding end[o]; nothing where begin[o] >= end[o]. An average divides by divisor[o] of both
// axes' product.
struct PoolAxis {
  const int32_t* begin;
  const int32_t* end;
  const int32_t* divisor;
  int32_t step;
};

struct PoolParams {
  Output out;
  Activation act;
  Input x;
  PoolAxis y, x_axis;
  bool maximum;
  Window window_y, window_x;  // kernel 0: an adaptive pool, whose candidates follow begin and end
};

// The mean over the sites of a stream, from sums over tiles of kPoolTile consecutive sites.
constexpr int64_t kPoolTile = 256;
struct GlobalPoolParams {
  Output out;
  Activation act;
  Input x;
  float* partial;  // [n, tiles, c]
};

// Output coordinate o reads first[o] with weight 1 - lambda[o] and last[o] with weight lambda[o].
struct ResizeAxis {
  const int32_t* first;
  const int32_t* last;
  const float* lambda;
};

struct ResizeParams {
  Output out;
  Activation act;
  Input x;
  ResizeAxis y, x_axis;
  bool linear;  // otherwise first[o] alone
};

}  // namespace deltafx
